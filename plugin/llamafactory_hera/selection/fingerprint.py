"""A fingerprint of the language model in a checkpoint, and whether the teacher is the model's own vision tower.

Both read a sample of every weight, not every byte: any training changes all of them, and reading a few rows of each
takes a moment where hashing tens of gigabytes takes minutes. Names and storage type are made equal first, so that an
LLM and the multimodal checkpoint that was built on it have the same fingerprint.
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

from ..heads.families import HeadLayout
from ..teachers.files import weight_files

_TEXT_LAYER = re.compile(r"(?:^|\.)(?:model|language_model)\.(layers\.\d+\..+)$")
_VISION_LAYER = re.compile(r"(?:^|\.)(encoder\.layers?\.\d+\..+)$")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_ROWS, _COLUMNS = 8, 256


def model_fingerprint(folder: Path, layout: HeadLayout, adapters: Sequence[Path] = ()) -> str:
    """A digest of a checkpoint's language model: its head layout and a sample of each weight of its decoder layers.

    The vision tower, the projector and the embeddings are left out: they do not decide which heads there are, and the
    paper selects before they are joined.

    Args:
        folder: A checkpoint's folder.
        layout: Of its text decoder.
        adapters: Folders of adapters that are loaded upon it.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: The folder holds no whole weights, or none of a text decoder.
    """
    digest = hashlib.sha256(json.dumps(asdict(layout) | {"model_type": None}, sort_keys=True).encode())
    weights = dict(_sampled(weight_files(folder), _TEXT_LAYER))
    if not weights:
        raise ValueError(f"model_name_or_path: no decoder layer is found among the weights in {folder}.")
    for name in sorted(weights):
        digest.update(name.encode() + weights[name])
    for adapter in adapters:
        digest.update(_adapter_digest(adapter))
    return digest.hexdigest()


def is_own_vision_tower(model_folder: Path, teacher_folder: Path) -> bool:
    """Whether the teacher's encoder layers are those of the vision tower inside the model."""
    model = dict(_sampled(weight_files(model_folder), _VISION_LAYER))
    teacher = dict(_sampled(weight_files(teacher_folder), _VISION_LAYER))
    common = model.keys() & teacher.keys()
    # an encoder may be cut short, never to nothing
    return bool(common) and all(model[name] == teacher[name] for name in common)


def _sampled(files: Sequence[Path], pattern: re.Pattern) -> Iterator[tuple[str, bytes]]:
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name, short in _matching(file.keys(), pattern):
                    yield short, _sample(file.get_slice(name), file.get_slice(name).get_shape())
        else:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            for name, short in _matching(state.keys(), pattern):
                yield short, _sample(state[name], list(state[name].shape))


def _matching(names: Any, pattern: re.Pattern) -> Iterator[tuple[str, str]]:
    for name in names:
        match = pattern.search(name)
        if match is not None and "text_model" not in name:
            yield name, match[1]


def _sample(tensor: Any, shape: list[int]) -> bytes:
    if len(shape) == 0:
        values = tensor[...]
    elif len(shape) == 1:
        values = tensor[:_COLUMNS]
    else:
        step = max(1, shape[0] // _ROWS)
        values = torch.cat([tensor[row : row + 1, :_COLUMNS].flatten() for row in range(0, shape[0], step)])
    # a copy in another precision is the same model
    return values.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


def _adapter_digest(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
            return digest.digest()
    raise ValueError(f"adapter_name_or_path: {folder} holds no adapter ({' or '.join(_ADAPTER_FILES)}).")
