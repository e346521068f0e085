"""A cache of teacher features on disk, indexed by the content of the images.

The cache consists of shards: safetensors files with ``keys``, uint8 ``[n, 16]``, and ``features``, float16 ``[n, D]``.
Each flush writes a new shard atomically, and a shard never changes. Processes therefore need no locks.
"""

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import create_folder, write_safetensors
from .images import KEY_BYTES

logger = logging.getLogger("llamafactory_hera")

_SHARD_ROWS = 4096  # 8 MB for a teacher with D = 1024
_KEY = np.dtype(f"S{KEY_BYTES}")  # NumPy orders byte strings by their bytes, so sorted keys serve as an index


class FeatureCache:
    """A map from image keys to features that many processes can read and extend at the same time.

    A process sees the shards that existed when it last opened, flushed or refreshed the cache. A pickled copy lacks
    pending features. ``folder`` has a subfolder for each teacher, and ``dim`` is the length D of a feature.
    """

    def __init__(self, folder: str | Path, teacher_fingerprint: str, dim: int) -> None:
        self._arguments = (folder, teacher_fingerprint, dim)
        self.dim, self._metadata = dim, {"teacher": teacher_fingerprint}
        path = Path(folder).expanduser() / f"{teacher_fingerprint[:32]}-float16"
        self.folder = create_folder(path, "hera_teacher_cache")
        self._waiting: dict[bytes, Tensor] = {}
        self._known: set[Path] = set()
        self._shards: list[Any] = []  # memory maps of the features
        # The index takes 24 bytes per image: the sorted keys and, for each key, its shard and its row in the shard.
        self._keys: NDArray[np.bytes_] = np.empty(0, _KEY)
        self._places: NDArray[np.int32] = np.empty((0, 2), np.int32)
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __len__(self) -> int:
        """Returns the number of images whose features are stored or pending."""
        return len(np.union1d(self._keys, np.array(list(self._waiting), _KEY)))

    def __contains__(self, key: bytes) -> bool:
        """Returns whether the feature of an image is stored or pending."""
        start, end = (self._keys.searchsorted(np.array(key, _KEY), side) for side in ("left", "right"))
        return key in self._waiting or bool(start < end)

    def get(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        """Returns the feature of each 16-byte image key, ``[D]`` in float16 on the CPU, or None if not cached."""
        found = [self._waiting.get(key) for key in keys]
        start, end = (self._keys.searchsorted(np.array(keys, _KEY), side) for side in ("left", "right"))
        for i in np.flatnonzero(start < end):
            shard, row = self._places[start[i]].tolist()
            found[i] = torch.from_numpy(self._shards[shard][row])  # safetensors copies the row
        return found

    def put(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Adds the features ``[n, D]`` of n images, rounded to float16; cached keys keep their features."""
        features = features.detach().to("cpu", torch.float16, copy=True)
        if broken := features.isfinite().all(dim=1).logical_not().nonzero().flatten().tolist():
            raise ValueError(
                f"hera_teacher: the feature of the image with key {keys[broken[0]].hex()} is not finite in float16. "
                "Replace the image or the weights; if both are fine, unset hera_teacher_cache, which stores float16."
            )
        for key, feature, cached in zip(keys, features, self.get(keys), strict=True):
            if cached is None:
                self._waiting.setdefault(key, feature)
        if len(self._waiting) >= _SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the pending features to a new shard; if that raises an ``OSError``, they stay pending."""
        if self._waiting:
            keys = torch.frombuffer(bytearray(b"".join(self._waiting)), dtype=torch.uint8).view(-1, KEY_BYTES)
            tensors = {"keys": keys, "features": torch.stack(list(self._waiting.values()))}
            write_safetensors(self.folder / f"{uuid.uuid4().hex}.safetensors", tensors, self._metadata)
            self._waiting = {}
            self.refresh()

    def refresh(self) -> None:
        """Adds all shards written since the last call to the index."""
        keys, places = [self._keys], [self._places]
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._known):
            self._known.add(path)
            try:
                with safe_open(path, "np") as shard:
                    added, features = shard.get_tensor("keys").reshape(-1).view(_KEY), shard.get_slice("features")
                if (features.get_dtype(), features.get_shape()) != ("F16", [len(added), self.dim]):
                    raise ValueError(f"its features are not {len(added)} x {self.dim} in float16")
            except (OSError, ValueError, SafetensorError) as error:
                logger.warning(f"Ignored the cache file {path} ({error}); delete it. Its features will be recomputed.")
                continue
            keys.append(added)
            places.append(np.stack([np.full(len(added), len(self._shards)), np.arange(len(added))], 1, dtype=np.int32))
            self._shards.append(features)
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)  # the first of equal keys
        self._places = np.concatenate(places)[first]
