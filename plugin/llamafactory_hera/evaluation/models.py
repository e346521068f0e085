"""What a model is made of: its folders, a digest of them, and how it is loaded."""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

from ..files import read_json
from ..hub import CONFIG_FILE, local_folder, weight_files

ADAPTER = "adapter_config.json"
# beside the weights, what decides a prompt or an answer
_DECIDES = re.compile(
    "(config|generation_config|(pre)?processor_config|tokenizer|special_tokens|added_tokens|chat_template|vocab|merges|"
    "adapter_)"
)


def model_folders(name: str) -> list[Path]:
    """The folders of a model: its own, or an adapter's with its base behind it.

    Raises:
        ValueError: There is no model, or an adapter's base is not there; names it and the remedy.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER).is_file():
        return [local_folder(name, "MODEL", "a multimodal model, or the folder of an adapter")]
    base = read_json(folder / ADAPTER).get("base_model_name_or_path") or ""
    key = f"base_model_name_or_path of the adapter {folder}"
    if not base:
        raise ValueError(f"{key}: it names no model; write the folder or the hub id of the model it was trained on.")
    return [folder, local_folder(base, key, "the model it was trained on (relative to the working directory)")]


def weights_digest(folders: list[Path]) -> str:
    """A digest of all that decides a model's answers: weights, adapter, tokenizer, templates and settings.

    Raises:
        ValueError: Weights, an adapter's too, or the configuration are missing or not whole.
    """
    *adapters, base = folders
    try:
        read_json(base / CONFIG_FILE)
        files = list(weight_files(base))
    except ValueError as error:
        raise ValueError(f"MODEL: {error}. Copy or download the model again, whole.") from error
    for adapter in adapters:
        if not any(adapter.glob("adapter_model.*")):
            raise ValueError(f"MODEL: the adapter {adapter} holds no adapter_model.safetensors; copy it again, whole.")
    for folder in folders:
        files += [path for path in folder.iterdir() if path.is_file() and _DECIDES.match(path.name)]
    digest = hashlib.sha256()
    for path in sorted(set(files), key=lambda path: (folders.index(path.parent), path.name)):
        with path.open("rb") as file:
            digest.update(f"{folders.index(path.parent)} {path.name}".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def default_dtype() -> str:
    """As stored; without an accelerator whole precision, as a CPU computes no faster in half."""
    import torch

    return "auto" if torch.accelerator.is_available() else "float32"


def load_processor(name: str) -> Any:
    """What a model is asked with: its processor, an adapter's own where it has one.

    Raises:
        ValueError: It is not whole, has no chat template or takes no images.
    """
    from transformers import AutoProcessor

    *adapters, base = model_folders(name)
    whole = ("processor_config.json", "preprocessor_config.json")
    own = [folder for folder in adapters if any((folder / name).is_file() for name in whole)]
    folder = (own or [base])[0]
    try:
        processor: Any = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL: the processor of {folder} cannot be loaded; copy or download it again, whole, with "
            f"{' or '.join(whole)}. ({' '.join(str(error).split())[:200]})"
        ) from error
    if getattr(processor, "image_processor", None) is None or processor.chat_template is None:
        lacks = "chat template" if hasattr(processor, "image_processor") else "image processor"
        raise ValueError(f"MODEL: {name} has no {lacks}, with which it is asked; give a multimodal chat model.")
    return processor


def load(name: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """Model, an adapter merged, and processor.

    Raises:
        ValueError: It is not a multimodal model, or weights are missing, which transformers or PEFT would fill with
            random numbers; names the remedy.
    """
    from transformers import AutoModelForImageTextToText

    processor = load_processor(name)
    *adapters, base = model_folders(name)
    weight_files(base)
    try:
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
        found: Any = AutoModelForImageTextToText.from_pretrained(base, **options)
    except ValueError as error:  # transformers has no such class for the configuration
        kind = read_json(base / CONFIG_FILE).get("model_type")
        raise ValueError(f"MODEL: {name} is not a multimodal model that can be loaded ({kind}): {error}") from error
    model, loading = found
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"MODEL: the weights of {base} lack {len(missing)} tensors that its {CONFIG_FILE} asks for, first "
            f"{', '.join(missing[:3])}; copy or download it again, whole."
        )
    for folder in adapters:
        from peft import PeftModel

        with warnings.catch_warnings():  # PEFT warns of tensors that are missing, and leaves what it drew for them
            warnings.filterwarnings("error", "Found missing adapter keys")
            try:
                model = PeftModel.from_pretrained(model, folder).merge_and_unload()
            except (UserWarning, ValueError, TypeError) as error:
                raise ValueError(
                    f"MODEL: the adapter {folder} is not whole, or was trained on another model than {base}: "
                    f"{str(error)[:200]}; copy it again, or correct its base_model_name_or_path."
                ) from error
    return model.eval(), processor
