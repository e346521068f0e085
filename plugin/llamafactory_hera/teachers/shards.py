"""One file of the feature cache: features sorted by image key, each row with its checksum.

A shard is a safetensors file with ``keys`` uint8 ``[n, 16]`` (ascending), ``checksums`` uint32 ``[n]`` (crc32 of the
features' bytes), ``features`` ``[n, D]``, and in its metadata ``index_crc32``, the crc32 of keys and checksums. Keys
and checksums are held in memory (20 bytes a feature) and checked on opening; features are read, and checked, row by
row, so opening a cache of any size is quick and damage is found when it would matter.
"""

import os
import uuid
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from .files import safetensors_header
from .images import KEY_BYTES

SUFFIX = ".safetensors"
TEMPORARY_PREFIX = ".writing-"
_NUMPY_DTYPES = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
# Fixed-width byte strings compare like the bytes they hold, which makes numpy's searchsorted an index.
KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")


class CorruptShardError(ValueError):
    """A shard does not hold what its header or a checksum says."""


def key_array(keys: list[bytes]) -> NDArray[np.bytes_]:
    """``[n]`` keys as an array that can be searched."""
    return np.frombuffer(b"".join(keys), dtype=KEY_DTYPE)


def write_shard(folder: Path, keys: NDArray[np.bytes_], features: NDArray[np.floating]) -> Path:
    """Writes a shard under a temporary name, then renames it: readers see a whole file or none.

    Args:
        folder: Where shards are.
        keys: ``[n]``, distinct, in any order.
        features: ``[n, D]``.
    """
    order = np.argsort(keys)
    keys, features = np.ascontiguousarray(keys[order]), np.ascontiguousarray(features[order])
    checksums = np.fromiter(map(zlib.crc32, features), dtype=np.uint32, count=len(keys))
    name = uuid.uuid4().hex
    temporary = folder / f"{TEMPORARY_PREFIX}{name}"
    tensors = {"keys": keys.view(np.uint8).reshape(-1, KEY_BYTES), "checksums": checksums, "features": features}
    try:
        # Not safetensors' own file writing: killed halfway it leaves a file whose name says nothing.
        temporary.write_bytes(save(tensors, metadata={"index_crc32": str(_index_checksum(keys, checksums))}))
        os.replace(temporary, folder / f"{name}{SUFFIX}")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return folder / f"{name}{SUFFIX}"


class Shard:
    """An open shard.

    Rows are read with positioned reads of one descriptor: nothing is copied when a process forks, forked readers do
    not disturb each other, the shard stays readable after compaction has unlinked it, and a damaged disk raises an
    error where a memory map would kill the process.

    Raises:
        CorruptShardError: The file is not whole, or not a shard of this width and dtype.
        FileNotFoundError: It is gone.
    """

    def __init__(self, path: Path, dim: int, dtype: np.dtype) -> None:
        self.path = path
        self._descriptor = -1
        self._row_dtype, self._dim = dtype, dim
        try:
            header, start = safetensors_header(path)
            index_checksum = header.pop("__metadata__")["index_crc32"]
            shapes = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for name in header}
            n = shapes["keys"][1][0]
            if (
                shapes["keys"] != ("U8", (n, KEY_BYTES))
                or shapes["checksums"] != ("U32", (n,))
                or shapes["features"][1] != (n, dim)
                or _NUMPY_DTYPES.get(shapes["features"][0]) != dtype
            ):
                raise ValueError(f"it holds {shapes}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CorruptShardError(f"{path}: {error}") from error
        self._descriptor = os.open(path, os.O_RDONLY)
        self._features_at = start + header["features"]["data_offsets"][0]
        self.keys = np.frombuffer(self._read(start + header["keys"]["data_offsets"][0], n * KEY_BYTES), KEY_DTYPE)
        checksums_at = start + header["checksums"]["data_offsets"][0]
        self._checksums = np.frombuffer(self._read(checksums_at, n * 4), np.uint32)
        if str(_index_checksum(self.keys, self._checksums)) != index_checksum:
            raise CorruptShardError(f"{path}: the checksum of its keys is wrong")

    def __len__(self) -> int:
        return len(self.keys)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    def rows_of(self, keys: NDArray[np.bytes_]) -> NDArray[np.intp]:
        """The row of each of the ``[n]`` keys; -1 where this shard does not hold it."""
        if not len(self):
            return np.full(len(keys), -1)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return np.where(self.keys[rows] == keys, rows, -1)

    def feature(self, row: int) -> NDArray[np.floating]:
        """``[D]`` of one row; `CorruptShardError` when it is not what was written."""
        size = self._dim * self._row_dtype.itemsize
        feature = np.frombuffer(self._read(self._features_at + row * size, size), self._row_dtype)
        if zlib.crc32(feature) != self._checksums[row]:
            raise CorruptShardError(f"{self.path}: the checksum of row {row} is wrong")
        return feature

    def _read(self, offset: int, size: int) -> bytearray:
        # One call reads at most 2 GiB. A bytearray, so that tensors made from it are writable.
        content = bytearray()
        while len(content) < size:
            try:
                part = os.pread(self._descriptor, size - len(content), offset + len(content))
            except OSError as error:
                raise CorruptShardError(f"{self.path}: {error}") from error
            if not part:
                raise CorruptShardError(f"{self.path}: it ends early")
            content += part
        return content


def _index_checksum(keys: NDArray[np.bytes_], checksums: NDArray[np.uint32]) -> int:
    return zlib.crc32(checksums, zlib.crc32(keys))
