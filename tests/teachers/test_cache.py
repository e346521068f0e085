import hashlib
import multiprocessing
import os
import pickle
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llamafactory_hera.teachers.cache import FeatureCache

DIM = 8
TEACHER = "a" * 64
fork = multiprocessing.get_context("fork")


def keys_of(names):
    return [hashlib.sha256(str(name).encode()).digest()[:16] for name in names]


def features_of(names):
    return torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(int(name))) for name in names])


def put(cache, names):
    cache.put(keys_of(names), features_of(names))


def store(cache, names):
    """Writes a shard."""
    put(cache, names)
    cache.flush()


def holds(cache, names):
    """Returns whether the cache holds exactly the features that `put` stored under these names."""
    found = cache.get(keys_of(names))
    expected = features_of(names).half()
    return all(x is not None and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def run(processes, exitcode=0):
    """Runs processes at the same time and checks that all end with the exit code."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [exitcode] * len(processes)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


def opened(folder):
    return FeatureCache(folder, TEACHER, DIM)


@pytest.fixture
def cache(folder):
    return opened(folder)


def test_features_are_found_in_the_order_of_the_keys_before_and_after_flushing_and_by_a_new_reader(folder, cache):
    def check(reader):
        assert holds(reader, [3, 40, 1, 3, *range(50)])
        assert [feature is None for feature in reader.get(keys_of([1, 99, 2]))] == [False, True, False]
        assert [key in reader for key in keys_of([1, 99, 2])] == [True, False, True]
        assert reader.get([]) == []
        assert len(reader) == 50

    store(cache, range(3))
    put(cache, range(50))
    check(cache)
    cache.flush()
    check(cache)
    check(opened(folder))


def test_keys_with_zero_bytes_are_distinguished(cache, folder):
    keys = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1", b"\xff" * 16, b"\0\xff" * 8]
    cache.put(keys, features_of(range(5)))
    cache.flush()
    reader = opened(folder)
    assert torch.equal(torch.stack(reader.get(keys)), features_of(range(5)).half())
    assert reader.get([b"\1" + bytes(14) + b"\1"]) == [None]


def test_a_key_keeps_its_first_feature(cache):
    put(cache, [1])
    for _ in range(2):
        cache.put(keys_of([1, 2, 2]), features_of([7, 2, 8]))
        assert holds(cache, [1, 2])
        cache.flush()
    assert len(cache) == 2
    assert len(list(cache.folder.iterdir())) == 1


def test_changes_to_the_tensors_of_a_caller_do_not_reach_the_cache(cache):
    features = features_of([1, 2])
    cache.put(keys_of([1, 2]), features)
    features.zero_()
    cache.flush()
    cache.get(keys_of([1]))[0].zero_()
    assert holds(cache, [1, 2])


def test_teachers_do_not_share_features_and_a_shard_names_its_teacher(folder):
    cache = FeatureCache(folder, TEACHER, DIM)
    store(cache, [1])
    assert FeatureCache(folder, "b" * 64, DIM).get(keys_of([1])) == [None]
    (shard,) = cache.folder.iterdir()
    with safe_open(shard, "pt") as file:
        assert file.metadata() == {"teacher": TEACHER}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_features_that_are_not_finite_in_float16_are_refused(value, cache):
    features = features_of([1, 2])
    features[1, 3] = value
    with pytest.raises(ValueError, match=f"{keys_of([2])[0].hex()} is not finite in float16.*hera_teacher_cache"):
        cache.put(keys_of([1, 2]), features)
    assert len(cache) == 0


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "header": lambda content: content[:20] + b"\xff" * 20 + content[40:],
}


@pytest.mark.parametrize("damage", [*DAMAGE, "width", "keys"])
def test_an_unreadable_shard_is_ignored_with_a_warning_and_its_features_can_be_stored_again(
    damage, cache, folder, caplog
):
    store(cache, [3])
    broken = cache.folder / "0.safetensors"
    keys = torch.from_numpy(np.frombuffer(b"".join(keys_of([1, 2])), np.uint8).reshape(2, 16).copy())
    width = DIM + 1 if damage == "width" else DIM
    save_file({"keys" if damage != "keys" else "key": keys, "features": torch.ones(2, width).half()}, broken)
    if damage in DAMAGE:
        broken.write_bytes(DAMAGE[damage](broken.read_bytes()))
    reader = opened(folder)
    assert reader.get(keys_of([1, 2])) == [None, None]
    assert holds(reader, [3])
    assert len(reader) == 1
    store(reader, [1, 2])
    (message,) = caplog.messages
    assert f"{broken} (" in message
    assert "recomputed" in message
    assert holds(opened(folder), [1, 2, 3])


# several processes


def test_pickled_copies_are_small_and_see_after_refresh_what_others_have_written(cache):
    store(cache, range(2000))
    put(cache, [5000])
    assert len(pickle.dumps(cache)) < 500
    copy = pickle.loads(pickle.dumps(cache))
    assert holds(copy, range(2000))
    assert copy.get(keys_of([5000])) == [None]  # a pending feature stays in the process that computed it
    cache.flush()
    assert copy.get(keys_of([5000])) == [None]
    copy.refresh()
    assert holds(copy, [5000])


def test_processes_that_fill_a_cache_at_the_same_time_lose_nothing(folder):
    barrier = fork.Barrier(2)

    def child(start):
        barrier.wait(20)
        for first in range(start, start + 60, 6):
            cache = opened(folder)
            store(cache, range(first, first + 6))
            assert holds(cache, range(start, first + 6))

    # Both processes compute images 30 to 59.
    run([fork.Process(target=child, args=(start,), daemon=True) for start in (0, 30)])
    cache = opened(folder)
    assert holds(cache, range(90))
    assert len(cache) == 90


@pytest.mark.parametrize("when", ["while writing", "before the rename"])
def test_a_killed_writer_loses_only_what_it_had_not_flushed(when, folder, cache):
    store(cache, [1])

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        store(cache, [2])
        if when == "before the rename":
            os.replace = lambda *args: os.kill(os.getpid(), signal.SIGXFSZ)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        store(cache, [3])

    run([fork.Process(target=child, daemon=True)], -signal.SIGXFSZ)
    reader = opened(folder)
    assert holds(reader, [1, 2])
    assert reader.get(keys_of([3])) == [None]
    store(reader, [3])
    assert holds(opened(folder), [1, 2, 3])


def test_a_read_only_cache_can_be_read_but_not_extended(folder, cache, monkeypatch):
    store(cache, [1])

    def refuse(*args, **kwargs):  # root may write despite permissions
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    reader = opened(folder)
    assert holds(reader, [1])
    with pytest.raises(OSError, match="Read-only"):
        store(reader, [2])
    assert holds(reader, [1, 2])
    with pytest.raises(ValueError, match=r"^hera_teacher_cache: .* cannot be created \(Read-only"):
        opened(folder / "new")
