"""Measures a teacher cache of many images: ``python tests/bench/cache.py [--images 1000000] [--dim 1024]``.

The cache consists of one shard per 4096 images and of ``--small`` shards of one image, as the ends of short runs leave
them. The bench prints the time and memory to open it, the rate at which processes find batches of random images, and
the number of written features that are lost when two writers are killed.
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

from llamafactory_hera.teachers.cache import FeatureCache

TEACHER, SHARD, BATCH = "a" * 64, 4096, 16
fork = multiprocessing.get_context("fork")


def keys_of(first: int, n: int) -> list[bytes]:
    """Returns the random keys of n images by their numbers."""
    drawn = np.random.default_rng(first // SHARD).bytes(16 * SHARD)
    return [drawn[16 * i : 16 * i + 16] for i in range(first % SHARD, first % SHARD + n)]


def peak() -> float:
    """Returns the peak memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def write(folder: str, dim: int, images: int, small: int) -> None:
    """Writes full shards, which `put` flushes, and then shards of one image."""
    cache = FeatureCache(folder, TEACHER, dim)
    for first in range(0, images, SHARD):
        cache.put(keys_of(first, SHARD), torch.ones(SHARD, dim))
    for number in range(small):
        cache.put(keys_of(images + number, 1), torch.ones(1, dim))
        cache.flush()


def measure_opening(folder: str, dim: int) -> tuple[float, float, int]:
    """Opens the cache in this process; returns seconds, MiB and the number of images."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = peak(), time.perf_counter()
    cache = FeatureCache(folder, TEACHER, dim)
    seconds, mib = time.perf_counter() - start, peak() - before
    return seconds, mib, len(cache)


def measure_reading(folder: str, dim: int, images: int, seconds: float, seed: int) -> float:
    """Looks up batches of random images; returns keys per second."""
    cache, rng = FeatureCache(folder, TEACHER, dim), np.random.default_rng(seed)
    held, count, start = [keys_of(first, SHARD) for first in range(0, images, SHARD)], 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = [held[i // SHARD][i % SHARD] for i in rng.integers(0, images, BATCH)]
        count += sum(feature is not None for feature in cache.get(batch))
    return count / (time.perf_counter() - start)


def write_until_killed(folder: str, dim: int, first: int, written: Any) -> None:
    """Writes shards of new images until the process is killed; counts the images that were written."""
    cache = FeatureCache(folder, TEACHER, dim)
    while True:
        cache.put(keys_of(first, SHARD), torch.ones(SHARD, dim))
        written.value, first = first + SHARD, first + SHARD


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process."""
    with fork.Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    """Builds the cache in a temporary folder and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--small", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    dim, images = options.dim, -(-options.images // SHARD) * SHARD
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        alone(write, folder, dim, images, options.small)
        print(f"writing: {time.perf_counter() - start:.1f} s")
        for name in ("first", "second"):
            seconds, mib, held = alone(measure_opening, folder, dim)
            print(f"{name} opening: {seconds:.2f} s, {mib:.0f} MiB, {held:,} images")
        with fork.Pool(options.readers) as pool:
            calls = [(folder, dim, images, options.seconds, seed) for seed in range(options.readers)]
            rates = pool.starmap(measure_reading, calls)
        print(f"{options.readers} readers: {sum(rates):,.0f} keys per second, {min(rates):,.0f} the slowest")
        begin = [2 * images + SHARD, 3 * images + 2 * SHARD]
        written = [fork.Value("q", first) for first in begin]
        writers = [
            fork.Process(target=write_until_killed, args=(folder, dim, *each))
            for each in zip(begin, written, strict=True)
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
        print(f"two writers killed after {new:,} more images: {lost} of {images + new:,} lost")


if __name__ == "__main__":
    main()
