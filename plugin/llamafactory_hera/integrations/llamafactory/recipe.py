"""A recipe as the host reads it, with errors that name the key: the host's own name none, or come too late."""

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from llamafactory.data.parser import get_dataset_list
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import get_train_args
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.targets import AUTO
from llamafactory_hera.hub import local_folder
from llamafactory_hera.keys import typed
from llamafactory_hera.selection.run_yaml import RecipeFile

#: Settings that a pass without training has no use for, or under which the host would ask for more than it needs.
NOT_TRAINING: dict[str, Any] = {
    "do_train": False,
    "do_eval": False,
    "do_predict": False,
    "predict_with_generate": False,
    "plot_loss": False,
    "report_to": "none",
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "tokenized_path": None,
    "packing": False,
    "neat_packing": False,
}
_COUNTS = {"cutoff_len", "max_samples"}  # the host takes any value, and compares it with numbers later


class HostArguments(NamedTuple):
    """What the host's parser makes of a recipe."""

    model: Any
    data: Any
    training: Any
    finetuning: Any


class Recipe(NamedTuple):
    """A recipe set to score instead of train: the keys given beside the file, and all keys, with their values."""

    overrides: dict[str, Any]
    values: dict[str, Any]
    config: HeraConfig
    host: HostArguments


def read_recipe(path: str | os.PathLike | RecipeFile | None, overrides: Sequence[str] = (), **forced: Any) -> Recipe:
    """Reads a YAML or JSON recipe with the host's parser, for scoring; ``forced`` keys go over the overrides."""
    values, changes = read_values(path, overrides)
    # every head and layer is scored, whichever the recipe aligns and how
    layers = values.get("hera_granularity") == "layer"
    scored: dict[str, Any] = {"stage": "hera", "hera_objective": "contrastive"}
    scored |= {"hera_heads": None if layers else AUTO, "hera_layers": AUTO if layers else None}
    values = values | NOT_TRAINING | scored | forced
    host = host_arguments(values)
    return Recipe(changes, values, HeraConfig.from_keys(host.finetuning), host)


def read_values(
    path: str | os.PathLike | RecipeFile | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe with its overrides as plain values, before the host's parser sees them; and the overrides alone."""
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override}: it is neither a recipe nor key=value, for instance output_dir=saves/run.")
    changes = OmegaConf.from_cli(list(overrides))
    try:
        file = path if path is None or isinstance(path, RecipeFile) else RecipeFile.read(path)
        written = OmegaConf.load(StringIO(file.text)) if file is not None else OmegaConf.create({})
        values = OmegaConf.to_container(OmegaConf.merge(written, changes), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        name = file.path if file is not None else path
        raise ValueError(f"The recipe {name} is not YAML that the host can read: {error}") from error
    return values, {key: values[key] for key in changes}


def named_output(values: Mapping[str, Any], example: str) -> Path:
    """The output folder that a recipe must name; the host would take one in the working directory without asking."""
    if not values.get("output_dir"):
        raise ValueError(f"output_dir: none is named; say where the result goes, for instance output_dir={example}.")
    return Path(values["output_dir"])


def host_arguments(values: Mapping[str, Any]) -> HostArguments:
    """Parses a recipe's keys with the host's parser, and checks that what they name is there."""
    if values.get("stage") == "hera" and os.environ.get("HERA_DISABLE", "0") not in ("", "0"):
        raise ValueError(f"HERA_DISABLE: {os.environ['HERA_DISABLE']} keeps stage: hera from LLaMA-Factory; unset it.")
    if not values.get("model_name_or_path"):
        raise ValueError("model_name_or_path: none is named; give the folder of a model, or a hub id.")
    if values.get("dataset") is None:
        raise ValueError("dataset: none is named; name one with images and text.")
    adapter, tuning = values.get("adapter_name_or_path"), values.get("finetuning_type", "lora")
    if adapter and tuning != "lora":
        raise ValueError(
            f"adapter_name_or_path: {adapter} is loaded under finetuning_type: lora alone, and here it is {tuning}; "
            "set finetuning_type: lora, or remove the adapter."
        )
    for key in _COUNTS & values.keys():
        if values[key] is not None or key == "cutoff_len":
            typed(key, values[key], int)
    host = HostArguments(*get_train_args(dict(values))[:4])
    name, data = host.data.template, host.data
    if name is not None and name not in TEMPLATES:
        near = " or ".join(get_close_matches(name, TEMPLATES, cutoff=0.5)) or "llava_qwen3"
        raise ValueError(f"template: {name} does not exist; write the one of the model, for instance {near}.")
    check_datasets("dataset", data.dataset, data.dataset_dir)
    check_stream(data, host.training)
    adapter_folders(host.model)
    return host


def check_stream(data: Any, training: Any) -> None:
    """Checks that the host, which cuts a local file into as many parts as there are workers, makes one at least."""
    local = any(each.load_from == "file" for each in get_dataset_list(data.dataset, data.dataset_dir))
    if data.streaming and local and training.dataloader_num_workers == 0:
        raise ValueError(
            "dataloader_num_workers: 0 leaves LLaMA-Factory's streaming no part of a local dataset; set it to 1 or "
            "more, or streaming: false."
        )


def check_datasets(key: str, names: Sequence[str], folder: Any) -> None:
    """Checks that the datasets which a key names are those of a ``dataset_dir``."""
    try:
        get_dataset_list(names, folder)
    except ValueError as error:
        raise ValueError(
            f"{key}: {', '.join(names)} cannot be found in dataset_dir: {folder}. {error} Name datasets of its "
            "dataset_info.json, or add them there."
        ) from error


def model_folder(model_args: Any) -> Path:
    """The local folder of a model's files; of a hub model the snapshot, which is fetched with its weights."""
    name = model_args.model_name_or_path
    return local_folder(name, "model_name_or_path", "a whole model", **_hub_options(model_args))


def adapter_folders(model_args: Any) -> list[Path]:
    """The local folders of a run's adapters."""
    inside = model_args.adapter_folder or "."
    needs = (Path(inside) / "adapter_config.json").as_posix()
    what = "an adapter: the output folder of a LoRA run or of a calibration"
    return [
        local_folder(name, "adapter_name_or_path", what, True, needs, **_hub_options(model_args)) / inside
        for name in model_args.adapter_name_or_path or []
    ]


def _hub_options(model_args: Any) -> dict[str, Any]:
    cache, token = model_args.cache_dir, model_args.hf_hub_token
    return {"revision": model_args.model_revision, "cache_dir": cache, "token": token}
