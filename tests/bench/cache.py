"""A teacher cache of many images: ``python tests/bench/cache.py [--images 1000000] [--dim 1024]``.

Writes shards as runs leave them, one for 4096 images, and prints of a process that opens the cache for the first time
(which merges them) and for the second time how long that takes and what memory it adds; how many keys a second
processes find that read batches at once; and whether two writers that are killed lose anything that they had written.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamafactory_hera.teachers.cache import FeatureCache, key_array, write_shard

TEACHER, SHARD, BATCH = "a" * 64, 4096, 16
fork = multiprocessing.get_context("fork")


def keys_of(first: int, n: int) -> list[bytes]:
    """Keys of images by their numbers, spread as digests are."""
    drawn = np.random.default_rng(first // SHARD).bytes(16 * SHARD)
    return [drawn[16 * i : 16 * i + 16] for i in range(first % SHARD, first % SHARD + n)]


def peak() -> float:
    """MiB that this process has held at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def opening(folder: str, dim: int) -> tuple[float, float, int]:
    """Seconds, MiB and images of an opening, in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, start = peak(), time.perf_counter()
    cache = FeatureCache(folder, TEACHER, dim)
    return time.perf_counter() - start, peak() - before, sum(map(len, cache._shards.values()))


def reading(folder: str, dim: int, images: int, seconds: float, seed: int) -> float:
    """Keys a second, of images in an order of their own."""
    cache, rng = FeatureCache(folder, TEACHER, dim), np.random.default_rng(seed)
    held, count, start = [keys_of(first, SHARD) for first in range(0, images, SHARD)], 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = [held[i // SHARD][i % SHARD] for i in rng.integers(0, images, BATCH)]
        count += sum(feature is not None for feature in cache.get(batch))
    return count / (time.perf_counter() - start)


def writing(folder: str, dim: int, first: int, written: Any) -> None:
    """Writes shards of new images until it is killed; says which are written."""
    cache = FeatureCache(folder, TEACHER, dim)
    while True:
        cache.put(keys_of(first, SHARD), torch.ones(SHARD, dim))  # flushes
        written.value, first = first + SHARD, first + SHARD


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own."""
    with fork.Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Builds the cache in a temporary folder and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    dim, images = options.dim, -(-options.images // SHARD) * SHARD
    with tempfile.TemporaryDirectory() as folder:
        place = FeatureCache(folder, TEACHER, dim).folder
        for first in range(0, images, SHARD):
            write_shard(place / f"{first}.safetensors", key_array(keys_of(first, SHARD)), np.ones((SHARD, dim), "f2"))
        for name in ("first", "second"):
            seconds, mib, held = alone(opening, folder, dim)
            print(f"{name} opening: {seconds:.2f} s, {mib:.0f} MiB, {held:,} images")
        with fork.Pool(options.readers) as pool:
            rates = pool.starmap(reading, [(folder, dim, images, options.seconds, n) for n in range(options.readers)])
        print(f"{options.readers} processes at once: {sum(rates):,.0f} keys a second, {min(rates):,.0f} the slowest")
        begin = [images * (n + 1) for n in range(2)]
        written = [fork.Value("q", first) for first in begin]
        writers = [
            fork.Process(target=writing, args=(folder, dim, *each)) for each in zip(begin, written, strict=True)
        ]
        for writer in writers:
            writer.start()
        while any(each.value == first for each, first in zip(written, begin, strict=True)):
            time.sleep(0.1)
        time.sleep(options.seconds / 2)
        for writer in writers:
            writer.kill()
            writer.join()
        cache, lost = FeatureCache(folder, TEACHER, dim), 0
        spans = [(0, images), *((first, each.value) for first, each in zip(begin, written, strict=True))]
        for first in (first for low, high in spans for first in range(low, high, SHARD)):
            lost += sum(feature is None for feature in cache.get(keys_of(first, SHARD)))
        new = sum(high - low for low, high in spans[1:])
        print(f"two writers killed after {new:,} more images: {lost} lost of {images + new:,}")


if __name__ == "__main__":
    main()
