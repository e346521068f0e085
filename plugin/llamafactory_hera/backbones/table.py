"""The backbones in ``models.yaml`` (the source of recipes and model lists), and the shipped recipes."""

import shutil
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from ..heads.paper import PAPER_HEADS


class Backbone(NamedTuple):
    """An existing VLM, or the LLM that a LLaVA-style model is built on."""

    key: str  #: The prefix of its recipes' names.
    title: str
    checkpoint: str  #: Its hub id.
    template: str  #: The training template; for a LLaVA-style model, the template of stage 2.
    keys: Mapping[str, Any] = MappingProxyType({})  #: Further keys that its recipes set.
    notes: str = ""  #: A paragraph for the headers of its recipes.

    @property
    def heads(self) -> str:
        """The heads that the paper aligned, as a value of ``hera_heads``; empty for models not in the paper."""
        return PAPER_HEADS.get(self.checkpoint, "")


_TABLE = yaml.safe_load(Path(__file__).with_name("models.yaml").read_bytes())
#: The vision encoder and the teacher of all LLaVA-style models in the paper.
VISION_MODEL, TEACHER = _TABLE["vision_model"], _TABLE["teacher"]
#: The LLMs in the paper, by key; `build` combines each with ``VISION_MODEL``.
LANGUAGE_MODELS = {key: Backbone(key, **fields) for key, fields in _TABLE["language_models"].items()}
#: Existing VLMs, by key; they are trained without `build`.
NATIVE_MODELS = {key: Backbone(key, **fields) for key, fields in _TABLE["native_models"].items()}


def recipes_folder() -> Path:
    """Finds the folder of the recipes, in the repository or in the installed wheel."""
    repository = Path(__file__).parents[3] / "recipes"
    if (repository / "README.md").is_file():
        return repository
    for file in distribution("llamafactory-hera").files or ():
        if file.as_posix().endswith("share/llamafactory-hera/recipes/README.md"):
            return Path(file.locate()).resolve().parent
    raise ValueError("recipes: this installation contains none; use the recipes/ folder in a clone of the repository.")


def shipped_recipes() -> dict[str, str]:
    """Maps the name of each recipe to its title, which is the first comment line of the file."""
    folder = recipes_folder()
    files = sorted(file for place in (".", "ablations", "harc") for file in (folder / place).glob("*.yaml"))
    titles = (file.read_text("utf-8").partition("\n")[0].lstrip("# ") for file in files)
    return dict(zip((file.relative_to(folder).with_suffix("").as_posix() for file in files), titles, strict=True))


def copy_recipes(folder: str | Path) -> Path:
    """Copies the recipes and the folders that they refer to into ``folder/recipes``."""
    target = Path(folder, "recipes")
    if target.exists():
        raise ValueError(f"--copy-to: {target} exists; give another folder.")

    def ignored(parent: str, names: list[str]) -> list[str]:
        kept = ("ablations", "data", "deepspeed", "harc", "ms_swift", "transformers", "trl")
        return [name for name in names if Path(parent, name).is_dir() and name not in kept]

    return shutil.copytree(recipes_folder(), target, ignore=ignored, copy_function=shutil.copyfile)
