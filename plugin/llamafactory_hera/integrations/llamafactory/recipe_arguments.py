"""The host's parser for a recipe, with errors that name the key: the host's own name none, or come too late."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .argument_values import typed

_ADAPTER_CONFIG = "adapter_config.json"
_MOST_NAMES = 12
# The host takes any value for these, and compares it with numbers later.
_COUNTS = {"cutoff_len", "max_samples"}


def host_arguments(values: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Parses a recipe's keys and checks that what they name is there.

    Args:
        values: The keys, with training switched off.

    Returns:
        The host's arguments of model, data, training and fine-tuning.

    Raises:
        ValueError: A key or value is refused by the host, or names a model, adapter, dataset or template that is not
            there.
    """
    from llamafactory.hparams import get_train_args

    if not values.get("model_name_or_path"):
        raise ValueError("model_name_or_path: none is named; give the folder of a model, or a hub id.")
    adapter, tuning = values.get("adapter_name_or_path"), values.get("finetuning_type", "lora")
    if adapter and tuning != "lora":
        raise ValueError(
            f"adapter_name_or_path: {adapter} is loaded under finetuning_type: lora alone, and here it is {tuning}; "
            "set finetuning_type: lora, or remove the adapter."
        )
    for key in _COUNTS & values.keys():
        if values[key] is not None or key == "cutoff_len":
            typed(key, values[key], int)
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(dict(values))
    _check_template(data_args.template)
    _check_datasets(data_args)
    for name in model_args.adapter_name_or_path or []:
        _check_adapter(name, model_args)
    return model_args, data_args, training_args, finetuning_args


def named_output(values: Mapping[str, Any], example: str) -> Path:
    """The output folder that a recipe names; the host would take one in the working directory without asking.

    Raises:
        ValueError: It names none.
    """
    if not values.get("output_dir"):
        raise ValueError(f"output_dir: none is named; say where the result goes, for instance output_dir={example}.")
    return Path(values["output_dir"])


def _check_template(name: str | None) -> None:
    from llamafactory.data.template import TEMPLATES

    if name is not None and name not in TEMPLATES:
        near = " or ".join(get_close_matches(name, TEMPLATES, cutoff=0.5)) or "llava_qwen3"
        raise ValueError(f"template: {name} does not exist; write the one of the model, for instance {near}.")


def _check_datasets(data_args: Any) -> None:
    from llamafactory.extras.constants import DATA_CONFIG

    folder = data_args.dataset_dir
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    file = Path(folder) / DATA_CONFIG
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"dataset_dir: {file} cannot be read ({reason}); give the folder whose {DATA_CONFIG} names the datasets."
        ) from error
    for name in data_args.dataset:
        if name not in known:
            there = ", ".join([*list(known)[:_MOST_NAMES], *(["…"] if len(known) > _MOST_NAMES else [])])
            raise ValueError(f"dataset: {name} is not in {file}; choose among {there}, or add it there.")


def _check_adapter(name: str, model_args: Any) -> None:
    from transformers.utils.hub import cached_file

    inside = model_args.adapter_folder or ""
    try:
        if Path(name).is_dir():
            found = (Path(name) / inside / _ADAPTER_CONFIG).is_file()
        else:
            found = cached_file(
                name,
                _ADAPTER_CONFIG,
                subfolder=inside,
                cache_dir=model_args.cache_dir,
                revision=model_args.model_revision,
                token=model_args.hf_hub_token,
                _raise_exceptions_for_missing_entries=False,
            )
    except OSError:
        found = None
    if not found:
        raise ValueError(
            f"adapter_name_or_path: {name} is neither a folder with an {_ADAPTER_CONFIG} nor an adapter at hand; give "
            "the output folder of a LoRA run or of a calibration, or a hub id that can be reached."
        )
