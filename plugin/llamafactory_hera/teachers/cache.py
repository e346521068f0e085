"""Teacher features on disk, found by the content of the image."""

import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compaction import compact
from .images import KEY_BYTES
from .shards import SUFFIX, CorruptShardError, Shard, key_array, write_shard

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_DTYPES = {torch.float16: np.dtype(np.float16), torch.float32: np.dtype(np.float32)}
_MAX_SMALL_SHARDS = 64
_MERGED_SHARD_BYTES = 128 * 2**20


class FeatureCache:
    """A store ``image key -> feature`` that many processes read and write at once.

    Every teacher and dtype has its own sub-folder, named by the teacher's fingerprint, with a ``manifest.json`` that
    says whose it is. Each writer makes its own shard files, so writers never wait for each other; readers see the
    shards that were there when they opened the cache or called `refresh`, and their own. An image that two processes
    compute at once is stored twice and read once.

    The object can be pickled or forked into DataLoader workers: a copy reads what is on disk, and what this process
    has not flushed yet stays with this process.

    Args:
        folder: The cache's folder; made when missing.
        teacher_fingerprint: Of the teacher, see `files.teacher_fingerprint`.
        dim: Length D of a feature.
        dtype: float16 or float32: how features are stored and returned.
        teacher_name: Noted in the manifest, for people.
        flush_rows: `put` writes a shard by itself when so many features wait.
        key: The config key to name in errors.

    Raises:
        ValueError: The folder cannot be made, or holds a manifest of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher_fingerprint: str,
        dim: int,
        dtype: torch.dtype = torch.float16,
        teacher_name: str = "",
        flush_rows: int = 8192,
        key: str = "hera_teacher_cache",
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"{key}: features cannot be stored as {dtype}; use torch.float16 or torch.float32.")
        self._arguments = (folder, teacher_fingerprint, dim, dtype, teacher_name, flush_rows, key)
        self.dim, self.dtype, self.fingerprint = dim, dtype, teacher_fingerprint
        dtype_name = str(dtype).removeprefix("torch.")
        self.folder = Path(folder).expanduser() / f"{teacher_fingerprint[:32]}-{dtype_name}"
        self._flush_rows = flush_rows
        self._shards: dict[Path, Shard] = {}
        self._waiting: dict[bytes, Tensor] = {}
        self._process = os.getpid()
        manifest = {"teacher": teacher_fingerprint, "dim": dim, "dtype": dtype_name}
        self._claim(manifest | {"name": teacher_name}, manifest, folder, key)
        compact(self.folder, dim, _DTYPES[dtype], _MAX_SMALL_SHARDS, _MERGED_SHARD_BYTES)
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __len__(self) -> int:
        """Number of different images whose features are at hand."""
        keys = [shard.keys for shard in self._shards.values()]
        if self._waiting:
            keys.append(key_array(list(self._waiting)))
        return len(np.unique(np.concatenate(keys))) if keys else 0

    def __contains__(self, image_key: bytes) -> bool:
        return self.get([image_key])[0] is not None

    def get(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Looks features up.

        Args:
            keys: Image keys of 16 bytes, see `images.image_key`.

        Returns:
            For each key ``[D]`` in the cache's dtype on the CPU, or None when it is not held. A shard that turns out
            to be damaged is dropped with a warning; its features are then not held.
        """
        self._check_keys(keys)
        found: list[Tensor | None] = [self._waiting.get(key) for key in keys]
        wanted = key_array(list(keys))
        # A copy: dropping a damaged shard changes the dict.
        for shard in list(self._shards.values()):
            missing = [i for i, feature in enumerate(found) if feature is None]
            if not missing:
                break
            rows = shard.rows_of(wanted[missing])
            try:
                for i, row in zip(missing, rows, strict=True):
                    if row >= 0:
                        found[i] = torch.from_numpy(shard.feature(row))
            except CorruptShardError as error:
                self._drop(shard.path, error)
        return found

    def put(self, keys: Sequence[bytes], features: Tensor) -> Tensor:
        """Adds features; keys that are held already keep theirs.

        Args:
            keys: n image keys of 16 bytes.
            features: ``[n, D]`` of any dtype, on any device.

        Returns:
            ``[n, D]`` in the cache's dtype on the CPU, as a later `get` returns them. Use these: a first run that
            used unrounded features would choose other neighbours than its repetition from the cache.

        Raises:
            ValueError: Wrong shape, or a feature that is not finite in the cache's dtype.
            OSError: A full batch of waiting features could not be written (see `flush`).
        """
        self._check_keys(keys)
        if features.shape != (len(keys), self.dim):
            raise ValueError(f"{len(keys)} keys with features of shape {tuple(features.shape)}, not [n, {self.dim}]")
        features = features.detach().to("cpu", self.dtype, copy=True)
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            image = keys[int((~finite).nonzero()[0])].hex()
            raise ValueError(
                f"The teacher's feature of the image with key {image} is not finite in {self.dtype}. Store features "
                "as float32; if that fails too, the teacher's weights or the image are broken."
            )
        self._forget_parents_features()
        for i, held in enumerate(self.get(keys)):
            # Cloned: what waits must not change when the caller changes what it got.
            features[i] = self._waiting.setdefault(keys[i], features[i].clone()) if held is None else held
        if len(self._waiting) >= self._flush_rows:
            self.flush()
        return features

    def flush(self) -> None:
        """Writes the waiting features as one shard.

        Raises:
            OSError: The shard could not be written. No partial file stays; the features still wait.
        """
        self._forget_parents_features()
        if not self._waiting:
            return
        features = torch.stack(list(self._waiting.values())).numpy()
        try:
            path = write_shard(self.folder, key_array(list(self._waiting)), features)
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
            listed = set(self.folder.glob(f"*{SUFFIX}"))
            if all(self._open(path) for path in sorted(listed - self._shards.keys())):
                break
        for path in self._shards.keys() - listed:
            del self._shards[path]

    def _open(self, path: Path) -> bool:
        try:
            self._shards[path] = Shard(path, self.dim, _DTYPES[self.dtype])
        except FileNotFoundError:
            return False
        except CorruptShardError as error:
            self._drop(path, error)
        return True

    def _drop(self, path: Path, error: CorruptShardError) -> None:
        self._shards.pop(path, None)
        logger.warning(
            "The feature cache file %s is corrupt and left out; its features will be computed again. (%s)", path, error
        )
        try:
            # Out of every later reader's sight, but there for whoever wants to know what happened.
            os.replace(path, path.with_suffix(".corrupt"))
        except OSError:
            logger.info("%s could not be renamed", path)

    def _forget_parents_features(self) -> None:
        # In a forked copy the parent's waiting features are still the parent's to write.
        if self._process != os.getpid():
            self._process = os.getpid()
            self._waiting = {}

    def _claim(self, manifest: dict[str, Any], identity: dict[str, Any], folder: str | Path, key: str) -> None:
        path = self.folder / MANIFEST
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            held = None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read and is written again (%s)", path, error)
            held = None
        if held is not None:
            differing = [name for name in identity if held.get(name) != identity[name]]
            if differing:
                raise ValueError(
                    f"{key}: {self.folder} belongs to another teacher: its {MANIFEST} has another "
                    f"{' and '.join(differing)}. Give another folder or delete this one."
                )
            return
        temporary = self.folder / f".{MANIFEST}-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            raise ValueError(
                f"{key}: the folder {folder} cannot be made or written ({error.strerror or error}). Give a folder "
                "that this user can write to."
            ) from error

    @staticmethod
    def _check_keys(keys: Sequence[bytes]) -> None:
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"image keys must have {KEY_BYTES} bytes")
