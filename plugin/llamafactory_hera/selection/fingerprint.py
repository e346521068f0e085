"""A fingerprint of a language model, and whether the teacher is a model's own vision tower.

Both read some rows of every weight: one in a hundred takes seconds where all take minutes. Rows are whole and no
further apart than a head is wide: a merged calibration changes some heads alone, which are columns of an output
projection and rows of a value projection. Names and storage type are made equal first: an LLM and the multimodal
checkpoint that was built on it have the same fingerprint.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..heads.families import HeadLayout
from ..hub import weight_files

_TEXT_LAYER = re.compile(r"(?:^|\.)(?:model|language_model)\.(layers\.\d+\..+)$")
_VISION_LAYER = re.compile(r"(?:^|\.)(encoder\.layers?\.\d+\..+)$")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_ADAPTER_CONFIG = "adapter_config.json"
_ROWS = 8
# what PEFT puts into the name of a weight that it wraps
_ADAPTED = re.compile(r"\.(?:base_layer|original_module)(?=\.)")


def model_fingerprint(weights: Path | nn.Module, layout: HeadLayout, adapters: Sequence[Path] = ()) -> str:
    """A digest of a language model: its head layout and a sample of each weight of its decoder layers.

    The adapters on top of it are part of it; vision tower, projector and embeddings are not, which do not decide which
    heads there are. One in memory has that of the checkpoint it was loaded from; an adapter of PEFT counts once it
    has been trained.

    Args:
        weights: A checkpoint's folder, or a model in memory with whole, unquantized parameters.
        layout: Of its text decoder.
        adapters: Folders of those on top of it.

    Raises:
        ValueError: The folder holds no whole weights, or none of a text decoder.
    """
    digest = hashlib.sha256(json.dumps(asdict(layout) | {"model_type": None}, sort_keys=True).encode())
    sampled = dict(_sampled(weights, _TEXT_LAYER, layout.head_dim))
    if not sampled:
        where = weights if isinstance(weights, Path) else type(weights).__name__
        raise ValueError(f"model_name_or_path: no decoder layer is found among the weights in {where}.")
    for name in sorted(sampled):
        digest.update(name.encode() + sampled[name])
    for adapter in adapters:
        digest.update(_adapter_digest(adapter))
    return digest.hexdigest()


def is_own_vision_tower(weights: Path | nn.Module, teacher_folder: Path) -> bool:
    """Whether the teacher's encoder layers are those of the vision tower inside the model."""
    model = dict(_sampled(weights, _VISION_LAYER))
    teacher = dict(_sampled(teacher_folder, _VISION_LAYER))
    common = model.keys() & teacher.keys()
    # an encoder may be cut short, never to nothing
    return bool(common) and all(model[name] == teacher[name] for name in common)


def _sampled(weights: Path | nn.Module, pattern: re.Pattern, gap: int | None = None) -> Iterator[tuple[str, bytes]]:
    for tensors in [_in_memory(weights)] if isinstance(weights, nn.Module) else _in_files(weights):
        for name, tensor in tensors.items():
            match = pattern.search(name)
            if match is not None and "text_model" not in name:
                yield match[1], _sample(tensor, gap)


def _in_files(folder: Path) -> Iterator[dict[str, Any]]:
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield {name: file.get_slice(name) for name in sorted(file.keys())}
        else:
            yield torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _in_memory(model: nn.Module) -> dict[str, Tensor]:
    """The weights by their names in a checkpoint, those of adapters beside them unless the adapters are new."""
    tensors = {_ADAPTED.sub("", name): tensor for name, tensor in model.state_dict().items()}
    of_adapters = {
        name for name in tensors for adapter in getattr(model, "peft_config", {}) if f".{adapter}." in f"{name}."
    }
    # one of LoRA is new, and changes nothing, as long as its second factor is zero
    second = [name for name in of_adapters if ".lora_B." in name or ".lora_embedding_B." in name]
    if second and not any(tensors[name].any() for name in second):
        return {name: tensor for name, tensor in tensors.items() if name not in of_adapters}
    return tensors


def _sample(tensor: Any, gap: int | None) -> bytes:
    shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
    if len(shape) < 2:
        values = tensor[...]
    else:
        step = max(1, min(shape[0] // _ROWS, gap or shape[0]))
        values = torch.cat([tensor[row : row + 1].flatten() for row in range(0, shape[0], step)])
    # a copy in another precision is the same model
    return values.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def _adapter_digest(folder: Path) -> bytes:
    weights = next((folder / name for name in _ADAPTER_FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / _ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"adapter_name_or_path: {folder} holds no adapter ({_ADAPTER_CONFIG} and {' or '.join(_ADAPTER_FILES)})."
        )
    digest = hashlib.sha256(weights.read_bytes())
    # its ranks and scalings are part of it; the path of its base model is not
    config = json.loads((folder / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)
    for value in config.values():
        if isinstance(value, list):  # PEFT writes sets, in any order
            value.sort(key=str)
    digest.update(json.dumps(config, sort_keys=True).encode())
    return digest.digest()
