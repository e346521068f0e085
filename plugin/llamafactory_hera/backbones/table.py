"""The table of backbones, from which recipes, training templates and lists of models are made, and shipped recipes.

The heads are those of the paper (arXiv 2606.23885, table 5), selected with DINOv2-L as teacher, least aligned first.
"""

import shutil
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

#: The vision encoder and the teacher of all LLaVA-style models of the paper.
VISION_MODEL = "google/siglip2-so400m-patch14-384"
TEACHER = "facebook/dinov2-large"


class Backbone(NamedTuple):
    """A finished VLM, or the LLM that a LLaVA-style model is built on."""

    key: str  #: The prefix of the names of its recipes.
    title: str
    checkpoint: str  #: Its hub id.
    template: str  #: The training template; for a LLaVA-style model that of stage 2.
    heads: str = ""  #: A value of ``hera_heads``; empty for models that the paper does not use.


# fmt: off
_LANGUAGE_MODELS = (
    Backbone("qwen2_5_3b", "Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct", "llava_qwen2_5", "L3H4,L5H11,L5H14,L5H9,L5H15"),
    Backbone("qwen2_5_7b", "Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "llava_qwen2_5", "L14H5,L4H7,L14H4,L4H10,L4H13"),
    Backbone("qwen2_5_14b", "Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct", "llava_qwen2_5",
             "L13H27,L18H13,L0H9,L0H7,L3H8"),
    Backbone("qwen3_4b", "Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507", "llava_qwen3", "L7H6,L13H12,L3H6,L3H5,L13H13"),
    Backbone("qwen3_8b", "Qwen3-8B", "Qwen/Qwen3-8B", "llava_qwen3", "L13H12,L7H6,L3H5,L13H13,L13H15"),
    Backbone("qwen3_14b", "Qwen3-14B", "Qwen/Qwen3-14B", "llava_qwen3", "L14H24,L9H36,L9H32,L1H37,L1H36"),
    Backbone("vicuna_7b", "Vicuna-7B", "lmsys/vicuna-7b-v1.5", "llava_vicuna", "L0H14,L1H1,L0H1,L0H3,L0H30"),
    Backbone("vicuna_13b", "Vicuna-13B", "lmsys/vicuna-13b-v1.5", "llava_vicuna", "L0H38,L1H0,L0H11,L0H10,L0H26"),
    Backbone("llama3_8b", "Llama3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "llava_llama3",
             "L0H31,L2H21,L0H29,L2H23,L2H25"),
)

_NATIVE_MODELS = (
    Backbone("qwen2_5_vl_7b", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_vl"),
    Backbone("qwen3_vl_4b", "Qwen3-VL-4B", "Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl_nothink"),
    Backbone("llava_1_5_7b", "LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", "llava_vicuna"),
    Backbone("llava_next_7b", "LLaVA-NeXT-7B (Mistral)", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next_mistral"),
    Backbone("internvl3_8b", "InternVL3-8B", "OpenGVLab/InternVL3-8B-hf", "intern_vl"),
    Backbone("gemma3_4b", "Gemma-3-4B", "google/gemma-3-4b-it", "gemma3"),
)
# fmt: on

#: The LLMs of the paper, by key; `build` combines each with :data:`VISION_MODEL`.
LANGUAGE_MODELS = {model.key: model for model in _LANGUAGE_MODELS}
#: Finished VLMs, by key, which are trained without `build`.
NATIVE_MODELS = {model.key: model for model in _NATIVE_MODELS}
#: The training templates of LLaVA-style models, first the one of stage 1.
TEMPLATES = ("llava_plain", *dict.fromkeys(model.template for model in LANGUAGE_MODELS.values()))


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
    titles = (file.read_text("utf-8").partition("\n")[0].lstrip("# ") for file in files)
    return dict(zip((file.relative_to(folder).with_suffix("").as_posix() for file in files), titles, strict=True))


def copy_recipes(folder: str | Path) -> Path:
    """Copies the recipes with the folders that they refer to, without downloaded data, into ``folder/recipes``."""
    target = Path(folder, "recipes")
    if target.exists():
        raise ValueError(f"--copy-to: {target} exists; give another folder.")

    def ignored(parent: str, names: list[str]) -> list[str]:
        kept = ("ablations", "data", "deepspeed")
        return [name for name in names if Path(parent, name).is_dir() and name not in kept]

    return shutil.copytree(recipes_folder(), target, ignore=ignored, copy_function=shutil.copyfile)
