"""The content of both wheels, and installing and uninstalling them without other changes."""

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

from llamafactory_hera import __version__

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
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels of the core and of the patches."""
    folder = tmp_path_factory.mktemp("wheels")
    for project in (ROOT, ROOT / "patches"):
        _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project)
    (core,), (patches,) = folder.glob("llamafactory_hera-*"), folder.glob("llamafactory_hera_patches-*")
    return core, patches


def _environment(folder: Path) -> tuple[Path, Path]:
    """Makes an empty environment, and returns its Python and its site-packages folder."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python*/site-packages")
    return folder / "bin/python", site


def _install(python: Path, *wheels: Path) -> None:
    _run(*PIP, python, "install", "--quiet", "--no-deps", "--no-index", *wheels)


def _complete(folder: Path, *wheels: Path) -> Path:
    """Makes an environment with wheels, and with the tests' dependencies on its path; returns its Python."""
    python, site = _environment(folder)
    # Python ignores .pth files in folders that a .pth file adds, so the hook can only come from the wheels
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_dependencies.pth").write_text("\n".join(paths) + "\n")
    _install(python, *wheels)
    return python


@pytest.fixture(scope="module")
def python(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with both wheels."""
    return _complete(tmp_path_factory.mktemp("environment") / "venv", *wheels)


def test_the_core_contains_packages_and_recipes(wheels: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(wheels[0]).namelist()
    assert {"llamafactory_hera/cli.py", "llamafactory_hera/integrations/llamaboard/texts.yaml"} <= set(names)
    recipes = {name.split("share/llamafactory-hera/recipes/")[1] for name in names if "/share/" in name}
    files = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    repository_only = {"demo", "notebook", "study", "real", "rah_lora", "generate", "__pycache__"}
    assert recipes == {str(file) for file in files if not repository_only & set(file.parts)}
    assert not [name for name in names if re.search("/recipes/(demo|notebook|study|real|rah_lora|generate)", name)]


def test_the_core_runs_nothing_when_python_starts(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = _environment(tmp_path / "venv")
    _install(python, wheels[0])
    assert {path.name for path in site.iterdir()} == {
        "llamafactory_harc",
        "llamafactory_hera",
        f"llamafactory_hera-{__version__}.dist-info",
    }
    assert _run(python, "-c", STARTS) == "0\n"


def test_installing_both_registers_the_stage_and_doctor_finds_no_problem(python: Path) -> None:
    code = (
        "from llamafactory.hparams import FinetuningArguments; import llamafactory_hera.cli; "
        "print(FinetuningArguments(stage='hera', hera_heads='L0H1').own_stage, llamafactory_hera.__file__); "
        "llamafactory_hera.cli.main(['doctor'])"
    )
    printed = _run(python, "-c", code)
    assert re.search(rf"^hera {python.parents[1]}", printed, re.MULTILINE)
    for name in ("llamafactory-hera", "llamafactory-hera-patches"):
        assert re.search(rf"^ok  {name} +{__version__}\b", printed, re.MULTILINE)
    assert "No problem found." in printed
    assert python.with_name("llamafactory-hera").is_file()


def test_doctor_reports_missing_patches_as_the_only_problem(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    python = _complete(tmp_path / "venv", wheels[0])
    done = subprocess.run(
        [python.with_name("llamafactory-hera"), "doctor"], capture_output=True, text=True, cwd=tmp_path
    )
    assert re.search(r"^OFF llamafactory-hera-patches +not installed.*\n +-> .*\./patches`", done.stdout, re.MULTILINE)
    assert (done.returncode, done.stdout.splitlines()[-1][:10]) == (1, "1 problem(")


def test_the_patches_without_the_core_print_one_line_and_change_nothing(
    wheels: tuple[Path, Path], tmp_path: Path
) -> None:
    python = _complete(tmp_path / "venv", wheels[1])
    code = "import llamafactory.extras.packages, hera_patches; print(hera_patches.patches())"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "{}\n", done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "hera" in line)
    assert line.endswith("run `pip uninstall llamafactory-hera-patches`.")


@pytest.mark.parametrize("extras", ["", "[llamafactory,deepspeed]"])
def test_installing_changes_no_version_of_another_package(
    python: Path, wheels: tuple[Path, Path], extras: str
) -> None:
    given = (f"{wheels[0]}{extras}", wheels[1])
    command = (*PIP, python, "install", "--dry-run", "--quiet", "--no-index", "--report", "-", *given)
    ours = {"llamafactory-hera", "llamafactory-hera-patches"}
    assert {each["metadata"]["name"] for each in json.loads(_run(*command))["install"]} <= ours


def test_the_core_requires_no_specific_versions(wheels: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(wheels[0])
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (.+)$", archive.read(metadata).decode(), re.MULTILINE)
    core = [line for line in required if "extra ==" not in line]
    assert core
    assert all(re.fullmatch(r"[\w.-]+", line) for line in core), core


def test_uninstalling_removes_the_startup_hook_and_every_file(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = _environment(tmp_path / "venv")
    _install(python, *wheels)
    assert _run(python, "-c", STARTS) == "1\n"
    _run(*PIP, python, "uninstall", "--quiet", "--yes", "llamafactory-hera-patches")
    assert _run(python, "-c", STARTS) == "0\n"
    _run(*PIP, python, "uninstall", "--quiet", "--yes", "llamafactory-hera")
    assert list(site.rglob("*hera*")) == []


def test_heads_are_read_and_trained_without_any_host(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    python, site = _environment(tmp_path / "venv")
    _install(python, wheels[0])
    # transformers needs torchvision to read images but does not declare it; users of a VLM have installed it
    needed: set[str] = set()
    waiting = ["llamafactory-hera", "torchvision", "pytest"]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            required = [Requirement(line) for line in requires(name) or []]
            waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    for name in needed - {"llamafactory-hera"}:
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
