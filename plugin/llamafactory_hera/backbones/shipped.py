"""The recipes that come with the package: their titles, and a copy to work with."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

# The folders inside ``recipes/`` that the recipes refer to.
_FOLDERS = ("ablations", "data", "deepspeed")


def recipes_folder() -> Path:
    """Finds the folder of the recipes in the repository or in the installed wheel."""
    repository = Path(__file__).parents[3] / "recipes"
    if (repository / "README.md").is_file():
        return repository
    for file in distribution("llamafactory-hera").files or ():
        if file.as_posix().endswith("share/llamafactory-hera/recipes/README.md"):
            return Path(file.locate()).resolve().parent
    raise ValueError("recipes: this installation contains none; use the folder recipes/ of a clone of the repository.")


def shipped_recipes() -> dict[str, str]:
    """Maps the name of each recipe to its title, which is the first comment line of the file."""
    folder = recipes_folder()
    files = sorted((*folder.glob("*.yaml"), *folder.glob("ablations/*.yaml")))
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    return dict(zip(names, (file.read_text("utf-8").partition("\n")[0].lstrip("# ") for file in files), strict=True))


def copy_recipes(folder: str | Path) -> Path:
    """Copies the recipes with ``dataset_info.json`` and the DeepSpeed files into ``folder/recipes``.

    Paths in the recipes begin with ``recipes/``, so the copy runs from ``folder``. Downloaded data are not copied.
    """
    target = Path(folder, "recipes")
    if target.exists():
        raise ValueError(f"--copy-to: {target} exists; give another folder.")

    def ignored(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(parent, name).is_dir() and name not in _FOLDERS]

    return shutil.copytree(recipes_folder(), target, ignore=ignored, copy_function=shutil.copyfile)
