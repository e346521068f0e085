"""Merges a cache's many small shards into few large ones, and sweeps up what killed writers left."""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .shards import KEY_DTYPE, SUFFIX, TEMPORARY_PREFIX, CorruptShardError, Shard, write_shard

logger = logging.getLogger(__name__)

LOCK_FILE = ".compaction.lock"
# A temporary file of this age has lost its writer: a shard takes seconds to write.
_ABANDONED_AFTER_SECONDS = 3600


def compact(folder: Path, dim: int, dtype: np.dtype, max_shards: int, shard_bytes: int) -> int:
    """Merges small shards when there are more than ``max_shards`` of them.

    Only one process does it at a time; the others go on at once. A merged shard is in place before its parts are
    unlinked, so killing the process loses nothing: what is then held twice is the same.

    Args:
        folder: Where the shards are.
        dim: Width of a feature.
        dtype: Of the features.
        max_shards: How many shards smaller than half of ``shard_bytes`` are left alone.
        shard_bytes: Size of the features of a merged shard.

    Returns:
        How many shards were merged; 0 when there was nothing to do, another process is at it, or the folder cannot
        be written.
    """
    try:
        with _lock(folder / LOCK_FILE) as held:
            if not held:
                return 0
            _sweep(folder)
            small = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.stat().st_size < shard_bytes // 2]
            if len(small) <= max_shards:
                return 0
            return _merge(folder, small, dim, dtype, shard_bytes)
    except OSError as error:
        # A cache that cannot be tidied (read-only, full disk, file system without locks) can still be read.
        logger.info("The feature cache %s is not compacted: %s", folder, error)
        return 0


def _merge(folder: Path, paths: list[Path], dim: int, dtype: np.dtype, shard_bytes: int) -> int:
    merged = 0
    for group in _groups(paths, shard_bytes):
        features: dict[bytes, np.ndarray] = {}
        whole = []
        for path in group:
            try:
                shard = Shard(path, dim, dtype)
                for row in range(len(shard)):
                    features.setdefault(bytes(shard.keys[row]), shard.feature(row))
                whole.append(path)
            except CorruptShardError:
                # Left in place: whoever opens the cache reports it.
                continue
        if len(whole) > 1:
            write_shard(folder, np.array(list(features), dtype=KEY_DTYPE), np.stack(list(features.values())))
            for path in whole:
                path.unlink(missing_ok=True)
            merged += len(whole)
    return merged


def _groups(paths: list[Path], shard_bytes: int) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for path in paths:
        group.append(path)
        size += path.stat().st_size
        if size >= shard_bytes:
            yield group
            group, size = [], 0
    if group:
        yield group


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
            path.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    # The kernel drops the lock when its holder dies, so a killed compaction blocks nobody.
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
