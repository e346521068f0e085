"""A recipe of the host: its keys, the arguments that the host's parser creates, and errors with the host's keys."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from llamafactory.hparams import get_train_args
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.hub import local_folder
from llamafactory_hera.integrations.messages import translated
from llamafactory_hera.selection.run_yaml import RecipeFile

from .arguments import check_names

#: Values that switch off training keys of a recipe, for commands that do not train.
NOT_TRAINING: dict[str, Any] = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "predict_with_generate", "plot_loss"), False),
    **dict.fromkeys(("load_best_model_at_end", "packing", "neat_packing"), False),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "tokenized_path")),
    "report_to": "none",
}


class HostArguments(NamedTuple):
    """The arguments that the host's parser creates from a recipe."""

    model: Any
    data: Any
    training: Any
    finetuning: Any


class Recipe(NamedTuple):
    """A recipe adapted for scoring: the overrides, all keys, HeRA's settings and the host's arguments."""

    overrides: dict[str, Any]
    values: dict[str, Any]
    config: HeraConfig
    host: HostArguments


def read_recipe(path: str | os.PathLike | RecipeFile | None, overrides: Sequence[str] = (), **forced: Any) -> Recipe:
    """Reads a recipe for scoring; ``key=value`` overrides replace its keys, and ``forced`` replaces both."""
    values, changes = read_values(path, overrides)
    # All heads and layers are scored, regardless of the targets and the objective of the recipe.
    scored = {"stage": "hera", "hera_objective": "contrastive", "hera_heads": AUTO, "hera_layers": AUTO}
    values = values | NOT_TRAINING | scored | forced
    host = host_arguments(values)
    return Recipe(changes, values, HeraConfig.from_keys(host.finetuning), host)


def read_values(
    path: str | os.PathLike | RecipeFile | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the keys of a recipe with its overrides, and the overrides separately."""
    file = RecipeFile.read(path) if isinstance(path, str | os.PathLike) else path
    try:
        changes = OmegaConf.from_cli(list(overrides))
        written = OmegaConf.load(StringIO(file.text)) if file is not None else OmegaConf.create({})
        values = OmegaConf.to_container(OmegaConf.merge(written, changes), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        name = " ".join([*([str(file.path)] if file is not None else []), *overrides])
        raise ValueError(f"{name} is not a YAML recipe: {' '.join(str(error).split())}") from error
    return values, {key: values[key] for key in changes}


def host_arguments(values: Mapping[str, Any]) -> HostArguments:
    """Parses the keys of a recipe with the host's parser."""
    if values.get("dataset") is None:
        raise ValueError("dataset: the value is empty; give a dataset with images and text.")
    check_names(values)
    try:
        return HostArguments(*get_train_args(dict(values))[:4])
    except (AssertionError, AttributeError, OverflowError, TypeError) as error:  # the parser does not check all types
        raise ValueError(f"A value of the recipe has the wrong type ({error}); put text in quotes.") from error


def named_output(values: Mapping[str, Any], example: str) -> Path:
    """Returns the output folder, which a recipe must set, because the host's default is in the working directory."""
    if not values.get("output_dir"):
        raise ValueError(f"output_dir: the value is empty; give a folder for the result, such as {example}.")
    return Path(str(values["output_dir"])).expanduser()


def model_folder(model_args: Any) -> Path:
    """Returns the local folder of the model; downloads the model if it is on the hub."""
    return local_folder(model_args.model_name_or_path, "model_name_or_path", "a model", **_hub(model_args))


def adapter_folders(model_args: Any) -> list[Path]:
    """Returns the local folders of the adapters of a run."""
    inside = Path(model_args.adapter_folder or ".")
    options = {"needs": (inside / "adapter_config.json").as_posix(), **_hub(model_args)}
    names = model_args.adapter_name_or_path or []
    return [local_folder(name, "adapter_name_or_path", "an adapter", **options) / inside for name in names]


def _hub(args: Any) -> dict[str, Any]:
    return {"revision": args.model_revision, "cache_dir": args.cache_dir, "token": args.hf_hub_token}


# -- errors ---------------------------------------------------------------------------------------------------------

# Setting in a message of the core -> the host's key.
_HOST_KEYS = {"model:": "model_name_or_path:", "adapter:": "adapter_name_or_path:", "images_of:": "dataset:"}
# Part of a message -> the host's keys to change.
_HINTS = {
    "Train earlier parameters": "freeze_multi_modal_projector: false, freeze_language_model: false, lora_target: all",
    "no image was found": "a dataset with an `images` column, or stage: sft",
    "raise the maximum length of a sample": "cutoff_len",
    "Check the path in the dataset": 'media_dir (in LLaMA Board, put {"media_dir": "FOLDER"} into "Extra arguments")',
}


@contextmanager
def host_words() -> Iterator[None]:
    """Replaces the setting at the start of an error's message with the host's key, and adds the keys to change."""

    def in_host_words(message: str) -> str:
        hints = [f" In LLaMA-Factory: {keys}." for part, keys in _HINTS.items() if part in message]
        setting, space, rest = message.partition(" ")
        return _HOST_KEYS.get(setting, setting) + space + rest + "".join(hints)

    with translated(in_host_words):
        yield
