"""Writes tensors into shards one after another: each appears whole or not at all, and a second start continues."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..teachers.files import safetensors_header
from .plan import PlannedTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards_of(planned: list[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    """Cuts the list into runs of at most ``shard_bytes``; a larger tensor is a shard of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    return shards


def write_shards(
    planned: list[PlannedTensor], folder: Path, shard_bytes: int, report: Callable[[str], None] = lambda line: None
) -> None:
    """Writes every shard that ``folder`` does not hold yet, and the index when there are several.

    At most one shard is in memory.

    Raises:
        OSError: A file cannot be written; the finished shards stay.
    """
    shards = shards_of(planned, shard_bytes)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        if _is_written(folder / name, tensors):
            report(f"shard {number} of {len(shards)} is there already")
            continue
        report(f"shard {number} of {len(shards)}")
        temporary = folder / f"{name}.tmp"
        try:
            save_file({tensor.name: tensor.make().contiguous() for tensor in tensors}, temporary, {"format": "pt"})
            os.replace(temporary, folder / name)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensor.n_bytes for tensor in planned)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, which appears whole or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def bytes_to_write(planned: list[PlannedTensor], folder: Path) -> int:
    """What is left to write."""
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return max(0, sum(tensor.n_bytes for tensor in planned) - there)


def _is_written(file: Path, tensors: list[PlannedTensor]) -> bool:
    if not file.is_file():
        return False
    try:
        header, _ = safetensors_header(file)
    except ValueError:
        return False
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"} == {
        tensor.name: tensor.shape for tensor in tensors
    }
