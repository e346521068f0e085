"""The files of a teacher: where they are, whether they are whole, and a fingerprint of what they hold."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from .families import FAMILIES

CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# In the order in which transformers prefers them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Raise this when the feature that is taken from the same files changes: caches of the old one must not be read.
_FEATURE_VERSION = 1
_HASH_BLOCK = 16 * 2**20
# What saving or copying a model changes without changing what it computes.
_INCIDENTAL_KEYS = ("_name_or_path", "_commit_hash", "transformers_version")


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Reads the header of a safetensors file and checks that the file is whole.

    Returns:
        The header (tensor name -> ``dtype``, ``shape``, ``data_offsets``; perhaps ``__metadata__``) and the byte at
        which the data starts.

    Raises:
        ValueError: The file is no safetensors file, or shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is not a whole safetensors file")
        try:
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} has no valid safetensors header") from error
    if 8 + length + end != size:
        raise ValueError(f"{path} holds {size} bytes where its header says {8 + length + end}")
    return header, 8 + length


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; ``ValueError`` naming the file when it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def processor_config(folder: Path) -> dict[str, Any] | None:
    """The image processor's settings, also where they are kept inside a processor of text and images."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            content = read_json(folder / name)
            if name == PROCESSOR_FILES[0]:
                return content
            if isinstance(content.get("image_processor"), dict):
                return content["image_processor"]
    return None


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load from ``folder``.

    Raises:
        ValueError: There are none, a part that the index names is missing, or a file is not whole.
    """
    first = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder} holds no weights (looked for {', '.join(WEIGHT_FILES)})")
    files = [first]
    if first.name.endswith(".index.json"):
        files = [folder / name for name in sorted(set(read_json(first).get("weight_map", {}).values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; {first.name} names it")
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in {folder}")
        if file.suffix == ".safetensors":
            safetensors_header(file)
    return files


def teacher_fingerprint(folder: str | Path) -> str:
    """A digest of everything that decides a teacher's features.

    It covers ``config.json`` and the image processor's settings (parsed, so layout and the keys that saving adds do
    not count), every byte of every weight file, and which output is the feature. The same files in another folder
    have the same fingerprint. The same weights split over other files have another one: their features are computed
    again, never mixed. Not covered: library versions, the dtype and the device that the teacher runs in.

    Returns:
        64 hexadecimal digits.
    """
    folder = Path(folder)
    weights = weight_files(folder)
    config = read_json(folder / CONFIG_FILE)
    family = FAMILIES.get(config.get("model_type", ""))
    digest = hashlib.sha256()
    described = {
        "version": _FEATURE_VERSION,
        "output": family.output if family else None,
        "config": _without_incidentals(config),
        "processor": _without_incidentals(processor_config(folder)),
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    for file in weights:
        stat = file.stat()
        digest.update(file.name.encode() + b"\0" + _file_digest(str(file), stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_incidentals(item) for key, item in value.items() if key not in _INCIDENTAL_KEYS}
    return value


@lru_cache(maxsize=64)
def _file_digest(path: str, size: int, _mtime_ns: int) -> bytes:
    # Blocks are hashed by several threads (hashlib releases the GIL) and the digest is that of the block digests:
    # a teacher of gigabytes costs about what reading it costs, and no byte is left out.
    descriptor = os.open(path, os.O_RDONLY)
    try:

        def block_digest(offset: int) -> bytes:
            return hashlib.sha256(os.pread(descriptor, _HASH_BLOCK, offset)).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return hashlib.sha256(b"".join(pool.map(block_digest, range(0, size, _HASH_BLOCK)))).digest()
    finally:
        os.close(descriptor)
