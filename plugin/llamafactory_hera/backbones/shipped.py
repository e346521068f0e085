"""The recipes that come with the package: where they are, what they do, and a copy of them to work with."""

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_SHARE = "share/llamafactory-hera/recipes/"
_INDEX = "README.md"


def recipes_folder() -> Path:
    """The folder of the shipped recipes: of the installed wheel, or of the repository.

    Raises:
        ValueError: The installation has none.
    """
    repository = Path(__file__).parents[3] / "recipes"
    if (repository / _INDEX).is_file():
        return repository
    try:
        files = distribution("llamafactory-hera").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if f"{_SHARE}{_INDEX}" in file.as_posix():
            return Path(file.locate()).resolve().parent
    raise ValueError(
        "recipes: this installation holds none; reinstall with `pip install --force-reinstall --no-deps "
        "llamafactory-hera`, or take them from the repository's folder recipes/."
    )


def shipped_recipes() -> dict[str, str]:
    """Name of each recipe -> its first comment line."""
    found = {}
    folder = recipes_folder()
    for file in sorted((*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml"))):
        found[file.relative_to(folder).with_suffix("").as_posix()] = (
            file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        )
    return found


def copy_recipes(target: str | Path) -> list[Path]:
    """Copies every recipe, ``dataset_info.json`` and the DeepSpeed files into a new folder.

    Paths inside the recipes that begin with ``recipes/`` begin with the new folder.

    Raises:
        ValueError: The folder is not empty.
    """
    target, source = Path(target), recipes_folder()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--copy-to: {target} is not empty; give another folder.")
    small = [file for file in source.rglob("*") if file.is_file() and _belongs(file.relative_to(source))]
    copied = []
    for file in small:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        if file.suffix == ".yaml":
            text = file.read_text(encoding="utf-8").replace("recipes/", f"{target.as_posix()}/")
            place.write_text(text, encoding="utf-8")
            copied.append(place)
    return copied


def _belongs(file: Path) -> bool:
    """Not the data that a user has put beside ``dataset_info.json``."""
    return len(file.parts) == 1 or (len(file.parts) == 2 and file.parts[0] in ("ablations", "data", "deepspeed"))
