"""The wheel: what it holds, and that installing it is enough."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and the dependencies of this one on its path."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a path that a .pth adds has its own .pth files ignored: the plugin comes from the wheel alone
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + os.linesep)
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def test_it_holds_packages_hooks_and_recipes(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"llamafactory_hera.pth", "llamafactory_hera.start"} <= set(names)
    assert {"llamafactory_hera/cli.py", "hera_patches/registry.py"} <= set(names)
    assert "llamafactory_hera/integrations/llamaboard/texts.yaml" in names
    recipes = {name.split("share/llamafactory-hera/recipes/")[1] for name in names if "/share/" in name}
    files = {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    repository_only = {"study", "generate", "__pycache__"}
    assert recipes == {str(file) for file in files if not repository_only & set(file.parts)}
    assert not [name for name in names if "/recipes/study" in name or "/recipes/generate" in name]


def test_installing_it_registers_the_stage(python: Path) -> None:
    code = (
        "from llamafactory.hparams import FinetuningArguments; import llamafactory_hera; "
        "print(FinetuningArguments(stage='hera', hera_heads='L0H1').use_hera, llamafactory_hera.__file__)"
    )
    answer, path = _run(python, "-c", code).split()[-2:]
    assert answer == "True"
    assert str(python.parents[1]) in path


def test_commands_are_installed_and_the_doctor_is_content(python: Path) -> None:
    for name in ("llamafactory-hera", "lmf-hera"):
        assert "doctor" in _run(python.with_name(name), "--help")
    assert "Everything is in place." in _run(python.with_name("llamafactory-hera"), "doctor")
