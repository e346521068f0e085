"""Teacher features on disk, found by the content of the image.

A cache consists of shards: safetensors files with ``keys`` uint8 ``[n, 16]`` (ascending), ``checksums`` uint32 ``[n]``
(crc32 of each feature's bytes), ``features`` float16 ``[n, D]``, and in the metadata ``index_crc32``, that of keys and
checksums. A shard is written under a temporary name, renamed when it is whole, and never changed, so nobody waits for
anybody, on a shared network folder either. Keys and checksums are held in memory, 20 bytes a feature; features are
read, and checked, when they are asked for.
"""

import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ..files import write_json
from .images import KEY_BYTES

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SUFFIX = ".safetensors"
_TEMPORARY = ".writing-"
# A temporary file of this age has lost its writer: a shard takes seconds to write.
_ABANDONED_AFTER_SECONDS = 3600
# `put` writes a shard by itself when so many features wait.
_FLUSH_ROWS = 4096
_MAX_SMALL_SHARDS = 64
_MERGED_ROWS = 16_384  # held in memory four times while they are merged

# What opening or reading a shard raises that is not what was written.
DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError)

# Fixed-width byte strings compare like the bytes they hold, which makes numpy's searchsorted an index.
_KEY_DTYPE = np.dtype(f"S{KEY_BYTES}")


class Shard:
    """The keys of one shard, and its features row by row; raises DAMAGE where the file is gone or not whole.

    Features are read from the file, not from a memory map: on a damaged disk the map would kill the process.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self.path, self._row_bytes = path, 2 * dim
        with safe_open(path, "np") as opened:
            keys, self.checksums = opened.get_tensor("keys"), opened.get_tensor("checksums")
            index_checksum = opened.metadata()["index_crc32"]
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self._features_at = 8 + length + header["features"]["data_offsets"][0]
        self.keys: NDArray[np.bytes_] = keys.reshape(-1).view(_KEY_DTYPE)
        if not len(self) or str(_index_checksum(self.keys, self.checksums)) != index_checksum:
            raise ValueError("it holds nothing, or the checksum of its keys is wrong")

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which of the ``[n]`` keys this shard holds, and the row of each of them."""
        rows = self.keys.searchsorted(keys)
        rows[rows == len(self)] = 0
        (held,) = (self.keys[rows] == keys).nonzero()
        return held, rows[held]

    def read(self, rows: Iterable[int]) -> list[NDArray[np.float16]]:
        """``[D]`` of each row."""
        found = []
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(self._features_at + int(row) * self._row_bytes)
                content = bytearray(file.read(self._row_bytes))  # tensors made from it are writable
                if zlib.crc32(content) != self.checksums[row]:
                    raise ValueError(f"the checksum of row {row} is wrong")
                found.append(np.frombuffer(content, np.float16))
                if not np.isfinite(found[-1]).all():
                    raise ValueError(f"row {row} holds NaN or infinity")
        return found


def write_shard(path: Path, keys: NDArray[np.bytes_], features: NDArray[np.float16]) -> None:
    """Writes ``[n, D]`` features of ``[n]`` distinct keys, in any order; readers see a whole file or none."""
    order = np.argsort(keys)
    keys, features = np.ascontiguousarray(keys[order]), np.ascontiguousarray(features[order])
    checksums = np.fromiter(map(zlib.crc32, features), dtype=np.uint32, count=len(keys))
    key_bytes: np.ndarray = keys.view(np.uint8).reshape(-1, KEY_BYTES)
    tensors = {"keys": key_bytes, "checksums": checksums, "features": features}
    # Not `whole_file`: processes of several machines may write the same merged shard at once.
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(save(tensors, metadata={"index_crc32": str(_index_checksum(keys, checksums))}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def key_array(keys: Sequence[bytes]) -> NDArray[np.bytes_]:
    """``[n]`` keys as an array that can be searched."""
    return np.frombuffer(b"".join(keys), dtype=_KEY_DTYPE)


def _index_checksum(keys: NDArray[np.bytes_], checksums: NDArray[np.uint32]) -> int:
    return zlib.crc32(checksums.data, zlib.crc32(keys.data))


class FeatureCache:
    """A store ``image key -> feature`` that many processes read and write at once.

    Every teacher has its own sub-folder, named by its fingerprint. Readers see the shards that were there when they
    opened the cache or called `refresh`, and their own. A pickled copy reads what is on disk; what waits to be written
    stays with the process that computed it.

    Args:
        folder: The cache's folder; made when missing.
        teacher_fingerprint: Of the teacher, see `checkpoint.teacher_fingerprint`.
        dim: Length D of a feature.
        teacher_name: Noted in the manifest, for people.

    Raises:
        ValueError: The folder cannot be made.
    """

    def __init__(self, folder: str | Path, teacher_fingerprint: str, dim: int, teacher_name: str = "") -> None:
        self._arguments = (folder, teacher_fingerprint, dim, teacher_name)
        self.dim = dim
        self.folder = Path(folder).expanduser() / f"{teacher_fingerprint[:32]}-float16"
        self._shards: dict[Path, Shard] = {}
        self._waiting: dict[bytes, Tensor] = {}
        manifest = {"teacher": teacher_fingerprint, "dim": dim, "dtype": "float16", "name": teacher_name}
        if not (self.folder / MANIFEST).exists():
            write_json(self.folder / MANIFEST, manifest)
        self.refresh()
        try:
            self._merge()
        except OSError as error:
            # Read-only, full, or merged by another process just now: it can be read all the same.
            logger.info("The feature cache %s is not tidied up: %s", self.folder, error)
            self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __len__(self) -> int:
        """Number of different images whose features are at hand."""
        keys = [key_array(list(self._waiting)), *(shard.keys for shard in self._shards.values())]
        return len(np.unique(np.concatenate(keys)))

    def get(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Looks up image keys of 16 bytes: for each ``[D]`` in float16 on the CPU, or None when it is not held.

        A shard that turns out to be damaged is dropped with a warning; its features are then not held.
        """
        wanted = key_array(keys)
        found: list[Tensor | None] = [self._waiting.get(key) for key in keys]
        for shard in list(self._shards.values()):
            held, rows = shard.find(wanted)
            if not len(held):
                continue
            try:
                for i, feature in zip(held, shard.read(rows), strict=True):
                    found[i] = torch.from_numpy(feature) if found[i] is None else found[i]
            except FileNotFoundError:  # another process has merged it
                del self._shards[shard.path]
                self.refresh()
                return self.get(keys)
            except DAMAGE as error:
                self._drop(shard.path, error)
        return found

    def put(self, keys: Sequence[bytes], features: Tensor) -> Tensor:
        """Adds features ``[n, D]`` of n image keys; keys that are held already keep theirs.

        Returns:
            ``[n, D]`` in float16 on the CPU, as a later `get` returns them. Use these: a first run that
            used unrounded features would choose other neighbors than its repetition from the cache.

        Raises:
            ValueError: Wrong shape, or a feature that is not finite in float16.
            OSError: A full batch of waiting features could not be written (see `flush`).
        """
        if features.shape != (len(keys), self.dim):
            raise ValueError(f"{len(keys)} keys with features of shape {tuple(features.shape)}, not [n, {self.dim}]")
        features = features.detach().to("cpu", torch.float16, copy=True)
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            image = keys[int((~finite).nonzero()[0])].hex()
            raise ValueError(
                f"hera_teacher: its feature of the image with key {image} is not finite in float16: its weights or "
                "the image are broken. Replace them; if they are whole, remove hera_teacher_cache: it stores float16."
            )
        for i, held in enumerate(self.get(keys)):
            # Cloned: what waits must not change when the caller changes what it got.
            features[i] = self._waiting.setdefault(keys[i], features[i].clone()) if held is None else held
        if len(self._waiting) >= _FLUSH_ROWS:
            self.flush()
        return features

    def flush(self) -> None:
        """Writes the waiting features as one shard.

        Raises:
            OSError: The shard could not be written. No partial file stays; the features still wait.
        """
        if not self._waiting:
            return
        path = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        try:
            write_shard(path, key_array(list(self._waiting)), torch.stack(list(self._waiting.values())).numpy())
        except OSError as error:
            raise OSError(
                f"{len(self._waiting)} teacher features cannot be written to {self.folder} ({error}). Free space "
                "there, make it writable, or choose another folder."
            ) from error
        self._open(path)
        self._waiting = {}

    def refresh(self) -> None:
        """Sees the shards that other processes have written since, and lets go of those that were merged."""
        # A shard may be merged into another one between listing and opening it: then the listing is out of date.
        for _ in range(10):
            listed = set(self.folder.glob(f"*{_SUFFIX}"))
            if all(self._open(path) for path in sorted(listed - self._shards.keys())):
                break
        for path in self._shards.keys() - listed:
            del self._shards[path]

    def _merge(self) -> None:
        """Merges small shards when there are many, and sweeps up what killed writers left.

        What a run wrote of a full batch stays: a million images are 245 such shards, which open in a second, and
        merging them would take minutes.

        A merged shard is in place before its parts are unlinked, so killing the process loses nothing: what is then
        held twice is the same. It is named by its parts: processes that merge the same ones write the same file.
        """
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                path.unlink(missing_ok=True)
        small = sorted(path for path, shard in self._shards.items() if len(shard) < _FLUSH_ROWS)
        if len(small) <= _MAX_SMALL_SHARDS:
            return
        while small:
            rows: dict[bytes, NDArray[np.float16]] = {}
            parts: list[Path] = []
            while small and len(rows) < _MERGED_ROWS:
                shard = self._shards[small.pop(0)]
                try:
                    rows.update(zip(shard.keys, shard.read(range(len(shard))), strict=True))
                    parts.append(shard.path)
                except ValueError as error:
                    self._drop(shard.path, error)
            if len(parts) > 1:
                name = hashlib.sha256("".join(path.name for path in parts).encode()).hexdigest()[:32]
                merged = self.folder / f"{name}{_SUFFIX}"
                if not merged.exists():
                    write_shard(merged, np.array(list(rows), _KEY_DTYPE), np.stack(list(rows.values())))
                for path in parts:
                    path.unlink(missing_ok=True)
        self.refresh()

    def _open(self, path: Path) -> bool:
        try:
            self._shards[path] = Shard(path, self.dim)
        except FileNotFoundError:
            return False
        except DAMAGE as error:
            self._drop(path, error)
        return True

    def _drop(self, path: Path, error: Exception) -> None:
        self._shards.pop(path, None)
        logger.warning(
            "The feature cache file %s is corrupt and left out; its features will be computed again. (%s)", path, error
        )
        # Out of every later reader's sight, but there for whoever wants to know what happened.
        with suppress(OSError):
            os.replace(path, path.with_suffix(".corrupt"))
