"""The fingerprint of a language model: a digest of the first row of each weight. It takes seconds to compute."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..hub import local_folder, weight_files
from .families import HeadLayout, model_config

# Matches the name of a decoder weight from "layers" on, because the prefix differs between architectures.
_DECODER_WEIGHT = re.compile(r"(?:^|\.)(?:model|language_model)\.(layers\.\d+\..+)$")
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)(?=\.)")  # PEFT inserts these into the name of a weight


def model_fingerprint(
    weights: Path | nn.Module, layout: HeadLayout, adapters: Sequence[Path] = (), resumed: bool = False
) -> str:
    """Digests the head layout, the decoder layers in a checkpoint or a model, and the adapters on top of them.

    A model in memory needs complete, unquantized parameters; its LoRA adapters count once they have been trained,
    unless a ``resumed`` run may have loaded them from its own checkpoint.
    """
    rows = {}
    for name, tensor in _in_memory(weights, resumed) if isinstance(weights, nn.Module) else _in_files(weights):
        if match := _DECODER_WEIGHT.search(name):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape()
            row = tensor[(0,) * (len(shape) - 1)].detach().to(torch.bfloat16)  # equal for copies in any precision
            rows[match[1]] = row.cpu().view(torch.int16).numpy().tobytes()
    if not rows:
        raise ValueError(f"model: the weights of {str(weights)[:99]} contain no decoder layer; give a language model.")
    digest = hashlib.sha256(str(astuple(layout)[1:]).encode())  # without the model_type, which differs in VLMs
    for name in sorted(rows):
        digest.update(name.encode() + rows[name])
    for path in (path for folder in adapters for path in sorted(folder.glob("adapter_model.*"))[-1:]):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def weights_of(model: nn.Module) -> Path | nn.Module:
    """Returns a model, or, if its parameters are quantized or sharded, the folder that it was loaded from."""
    if not is_sharded(model) and all(parameter.is_floating_point() for parameter in model.parameters()):
        return model
    return local_folder(getattr(model_config(model), "_name_or_path", ""), "model", "a model")


def is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters are missing, because ZeRO-3 sharded them or they are on the meta device."""
    return any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters())


def _in_memory(model: nn.Module, resumed: bool) -> Iterator[tuple[str, Any]]:
    state = {_WRAPPED.sub("", name): tensor for name, tensor in model.state_dict().items()}
    trained = not resumed and any(tensor.any() for name, tensor in state.items() if ".lora_B." in name)
    yield from ((name, tensor) for name, tensor in state.items() if trained or ".lora_" not in name)


def _in_files(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield from ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
        else:
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()
