"""The folders of a model or an adapter: a digest of their content, and loading it."""

import hashlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import read_json
from ..hub import local_folder, weight_files

_ADAPTER = "adapter_config.json"
# The files besides the weights that affect an answer.
_SETTINGS = re.compile("(config|generation_config|.*processor_config|.*token|chat_template|vocab|merges|adapter_)")


def model_folders(name: str) -> list[Path]:
    """Finds the folder of a model (by path or hub id), or the folders of an adapter and of its base model.

    Raises:
        ValueError: The model, or the base model of the adapter, does not exist.
    """
    folder = Path(name).expanduser()
    if not (folder / _ADAPTER).is_file():
        return [local_folder(name, "MODEL", "a multimodal model, or the folder of an adapter")]
    base, key = read_json(folder / _ADAPTER).get("base_model_name_or_path"), "base_model_name_or_path"
    what = "the model that the adapter was trained on, as a hub id or a path from the working directory"
    return [folder, local_folder(base or "", f"{key} of the adapter {folder}", what)]


def weights_digest(folders: Sequence[Path]) -> str:
    """Computes a digest of the files that affect answers: weights, adapter, tokenizer, chat template and settings.

    Raises:
        ValueError: The model has no weights.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file() and _SETTINGS.match(path.name)]
        for path in sorted({*files, *(weight_files(folder) if folder == folders[-1] else ())}):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load(name: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """Loads a model, with its adapter merged, and the processor: the adapter's if it has one, or the base model's.

    Raises:
        ValueError: The model takes no images or has no chat template, or the base model's weights are incomplete.
        UserWarning: The adapter's weights are incomplete.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folders = model_folders(name)
    source = next((folder for folder in folders if any(folder.glob("*processor_config.json"))), folders[-1])
    processor: Any = AutoProcessor.from_pretrained(source)
    for attribute in ("image_processor", "chat_template"):
        if getattr(processor, attribute, None) is None:
            raise ValueError(f"MODEL: {source} has no {attribute.replace('_', ' ')}; give a multimodal chat model.")
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    model, loading = AutoModelForImageTextToText.from_pretrained(folders[-1], **options)
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"MODEL: {folders[-1]} lacks {len(missing)} weights, such as {missing[0]}; copy it again.")
    for folder in folders[:-1]:
        from peft import PeftModel

        with warnings.catch_warnings():  # PEFT would keep random numbers
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.eval(), processor
