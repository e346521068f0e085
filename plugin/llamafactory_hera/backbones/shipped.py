"""The recipes that come with the package: where they are, what they do, and a copy of them to work with."""

import re
import shlex
import shutil
from importlib.metadata import distribution
from pathlib import Path

_SHARE = "share/llamafactory-hera/recipes/"
_INDEX = "README.md"
# Of a copy, without what a user has put beside ``dataset_info.json``.
_FOLDERS = ("ablations", "data", "deepspeed")


def recipes_folder() -> Path:
    """The folder of the shipped recipes: of the repository, or of the installed wheel."""
    repository = Path(__file__).parents[3] / "recipes"
    if (repository / _INDEX).is_file():
        return repository
    for file in distribution("llamafactory-hera").files or []:
        if f"{_SHARE}{_INDEX}" in file.as_posix():
            return Path(file.locate()).resolve().parent
    raise ValueError(
        "recipes: this installation holds none; reinstall with `pip install --force-reinstall --no-deps "
        "llamafactory-hera`, or take them from the repository's folder recipes/."
    )


def shipped_recipes() -> dict[str, str]:
    """Name of each recipe -> its first comment line."""
    folder = recipes_folder()
    files = sorted((*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml")))
    titles = [file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files]
    return dict(zip((file.relative_to(folder).with_suffix("").as_posix() for file in files), titles, strict=True))


def copy_recipes(target: str | Path) -> list[Path]:
    """Copies every recipe, ``dataset_info.json`` and the DeepSpeed files; paths under ``recipes/`` are adapted."""
    target, source = Path(target), recipes_folder()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        problem = "is not empty" if target.is_dir() else "is a file"
        raise ValueError(f"--copy-to: {target} {problem}; give another folder.")
    copied, folders = [], (source, *(source / name for name in _FOLDERS))
    for file in (file for folder in folders for file in folder.iterdir() if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        if file.suffix in (".yaml", ".md", ".py"):
            place.write_text(_moved(file.read_text(encoding="utf-8"), target.as_posix()), encoding="utf-8")
        if file.suffix == ".yaml":
            copied.append(place)
    return copied


def _moved(text: str, folder: str) -> str:
    """The text with every path to something copied leading into another folder, quoted as a shell and YAML take it."""
    paths = re.compile(rf"(?<![\w/])recipes/(?:(?:{'|'.join(_FOLDERS)})\b[\w./-]*|[\w-]*\.[\w.-]+|(?![\w/]))")
    return paths.sub(lambda found: shlex.quote(f"{folder}/{found[0].removeprefix('recipes/')}"), text)
