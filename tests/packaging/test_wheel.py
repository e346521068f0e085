"""The wheel: its content, and that installing and uninstalling it changes nothing else."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--python")
STARTS = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('HeraStart'))"


def _run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    (built,) = folder.glob("*.whl")
    return built


def _environment(folder: Path) -> tuple[Path, Path]:
    """Makes an empty environment, and returns its Python and its site-packages folder."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin/python", site


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and with this environment's dependencies on its path."""
    python, site = _environment(tmp_path_factory.mktemp("environment") / "venv")
    # Python ignores .pth files in folders that a .pth file adds, so the hook can only come from the wheel
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_dependencies.pth").write_text("\n".join(paths) + "\n")
    _run(*PIP, python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def test_the_wheel_contains_packages_hooks_and_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"llamafactory_hera.pth", "llamafactory_hera.start"} <= set(names)
    assert {"llamafactory_hera/cli.py", "hera_patches/registry.py"} <= set(names)
    assert "llamafactory_hera/integrations/llamaboard/texts.yaml" in names
    recipes = {name.split("share/llamafactory-hera/recipes/")[1] for name in names if "/share/" in name}
    files = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    repository_only = {"demo", "notebook", "study", "real", "rah_lora", "generate", "__pycache__"}
    assert recipes == {str(file) for file in files if not repository_only & set(file.parts)}
    assert not [name for name in names if re.search("/recipes/(demo|notebook|study|real|rah_lora|generate)", name)]


def test_installing_registers_the_stage_and_doctor_finds_no_problem(python: Path) -> None:
    code = (
        "from llamafactory.hparams import FinetuningArguments; import llamafactory_hera.cli; "
        "print(FinetuningArguments(stage='hera', hera_heads='L0H1').use_hera, llamafactory_hera.__file__); "
        "llamafactory_hera.cli.main(['doctor'])"
    )
    printed = _run(python, "-c", code)
    assert re.search(rf"^True {python.parents[1]}", printed, re.MULTILINE)
    assert "No problem found." in printed
    assert python.with_name("llamafactory-hera").is_file()


@pytest.mark.parametrize("extras", ["", "[llamafactory,deepspeed]"])
def test_installing_changes_no_version_of_another_package(python: Path, wheel: Path, extras: str) -> None:
    command = (*PIP, python, "install", "--dry-run", "--quiet", "--no-index", "--report", "-", f"{wheel}{extras}")
    assert {each["metadata"]["name"] for each in json.loads(_run(*command))["install"]} <= {"llamafactory-hera"}


def test_the_core_requires_no_specific_versions(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    asked = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.MULTILINE)
    core = [line for line in asked if "extra ==" not in line]
    assert core
    assert all(re.fullmatch(r"[\w.-]+", line) for line in core), core


def test_uninstalling_removes_the_startup_hook(wheel: Path, tmp_path: Path) -> None:
    python, site = _environment(tmp_path / "venv")
    _run(*PIP, python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert _run(python, "-c", STARTS) == "1\n"
    _run(*PIP, python, "uninstall", "--quiet", "--yes", "llamafactory-hera")
    assert list(site.rglob("*hera*")) == []
    assert _run(python, "-c", STARTS) == "0\n"


def _needed(*names: str) -> set[str]:
    """Returns the given distributions and all their direct and indirect dependencies, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            asked = [Requirement(line) for line in requires(name) or []]
            waiting += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_heads_are_read_and_trained_without_any_host(wheel: Path, tmp_path: Path) -> None:
    python, site = _environment(tmp_path / "venv")
    _run(*PIP, python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # transformers needs torchvision to read images but does not declare it; users of a VLM have installed it
    for name in _needed("llamafactory-hera", "torchvision", "pytest") - {"llamafactory-hera"}:
        files = distribution(name)
        for top in {file.parts[0] for file in files.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(files.locate_file(top))
    assert "llamafactory_hera" in _run(python, "-c", "import llamafactory_hera; print(llamafactory_hera.__file__)")
    hosts = ("llamafactory", "deepspeed", "trl", "datasets", "gradio")
    found = _run(python, "-c", f"from importlib.util import find_spec; print(*filter(find_spec, {hosts}))")
    assert found == "\n"
    tests = ("tests/heads/test_capture_use.py", "tests/integrations/test_transformers.py")
    chosen = "the_gradient_is_that_of_the_definition or a_run_logs_its_curves"
    plain = ("-q", "-x", "-o", "addopts=", "-o", "timeout=0", "-p", "no:cacheprovider")
    assert "4 passed" in _run(python, "-m", "pytest", *plain, "-k", chosen, *tests)
