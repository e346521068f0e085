"""Measures opening and reading a large teacher cache: ``python benchmarks/cache.py [--images 1000000]``."""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llamafactory_hera.teachers.cache import FeatureCache

TEACHER, SHARD, BATCH = "a" * 64, 4096, 16
spawn = multiprocessing.get_context("spawn")


def keys_of(first: int, n: int) -> list[bytes]:
    """Returns the random keys of ``n`` images, beginning with image number ``first``."""
    drawn = np.random.default_rng(first // SHARD).bytes(16 * SHARD)
    return [drawn[16 * i : 16 * i + 16] for i in range(first % SHARD, first % SHARD + n)]


def write(folder: str, dim: int, images: int) -> None:
    """Writes only full shards, because `put` does not flush others."""
    cache = FeatureCache(folder, TEACHER, dim)
    for first in range(0, images, SHARD):
        cache.put(keys_of(first, SHARD), torch.ones(SHARD, dim))


def measure_opening(folder: str, dim: int) -> tuple[float, float, int]:
    """Opens the cache in a new process; returns seconds, MiB and the number of images."""
    memory = Path("/proc/self/statm")  # the second number counts resident pages
    before, start = int(memory.read_text().split()[1]), time.perf_counter()
    cache = FeatureCache(folder, TEACHER, dim)
    seconds, pages = time.perf_counter() - start, int(memory.read_text().split()[1]) - before
    return seconds, pages * resource.getpagesize() / 2**20, len(cache)


def measure_reading(folder: str, dim: int, images: int, seconds: float, seed: int) -> float:
    """Returns the number of keys found per second in random batches of images."""
    cache, rng = FeatureCache(folder, TEACHER, dim), np.random.default_rng(seed)
    keys, count, start = [keys_of(first, SHARD) for first in range(0, images, SHARD)], 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = [keys[i // SHARD][i % SHARD] for i in rng.integers(0, images, BATCH)]
        count += sum(feature is not None for feature in cache.get(batch))
    return count / (time.perf_counter() - start)


def main() -> None:
    """Builds the cache in a temporary folder and prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--readers", type=int, default=4)
    options = parser.parse_args()
    dim, images = options.dim, -(-options.images // SHARD) * SHARD
    with tempfile.TemporaryDirectory() as folder:
        write(folder, dim, images)
        with spawn.Pool(1) as pool:
            seconds, mib, n_images = pool.apply(measure_opening, (folder, dim))
        print(f"opening: {seconds:.2f} s, {mib:.0f} MiB, {n_images:,} images")
        with spawn.Pool(options.readers) as pool:
            calls = [(folder, dim, images, options.seconds, seed) for seed in range(options.readers)]
            rates = pool.starmap(measure_reading, calls)
        print(f"{options.readers} readers: {sum(rates):,.0f} keys per second in total; slowest: {min(rates):,.0f}")


if __name__ == "__main__":
    main()
