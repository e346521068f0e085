import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import save, save_file
from torch.utils.data import DataLoader

from llamafactory_hera.teachers import cache as cache_module
from llamafactory_hera.teachers.cache import FeatureCache, Shard, key_array, write_shard

DIM = 8
TEACHER = "a" * 64
fork = multiprocessing.get_context("fork")


def keys_of(names):
    return [hashlib.sha256(str(name).encode()).digest()[:16] for name in names]


def features_of(names):
    return torch.stack([torch.randn(DIM, generator=torch.Generator().manual_seed(int(name))) for name in names])


def put(cache, names):
    return cache.put(keys_of(names), features_of(names))


def store(cache, names):
    """Writes a shard."""
    put(cache, names)
    cache.flush()


def holds(cache, names):
    """Whether the cache holds exactly what `put` stored under these names."""
    expected = features_of(names).half()
    return all(
        found is not None and torch.equal(found, feature)
        for found, feature in zip(cache.get(keys_of(names)), expected, strict=True)
    )


def run(processes, exitcode=0):
    """Runs processes at the same time; they must all end with the exit code."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [exitcode] * len(processes)


def shard_files(cache):
    return sorted(cache.folder.glob("*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "features"


def opened(folder):
    return FeatureCache(folder, TEACHER, DIM)


@pytest.fixture
def flush_rows(monkeypatch):
    """flush_rows(n): how many features wait until they are written."""
    return lambda n: monkeypatch.setattr(cache_module, "_FLUSH_ROWS", n)


@pytest.fixture
def cache(folder):
    return opened(folder)


def test_what_was_put_is_found_in_the_order_of_the_keys_before_and_after_flushing_and_by_a_new_reader(folder, cache):
    store(cache, range(3))
    assert torch.equal(put(cache, range(50)), features_of(range(50)).half())
    for flushed in (False, True):
        for reader in (cache, opened(folder)) if flushed else (cache,):
            assert holds(reader, [3, 40, 1, 3, *range(50)])
            found = reader.get(keys_of([1, 99, 2]))
            assert [feature is None for feature in found] == [False, True, False]
            assert reader.get([]) == []
            assert len(reader) == 50
        cache.flush()


def test_a_cache_of_earlier_versions_is_read_also_elsewhere(folder, tmp_path):
    # its layout, written out
    inside = folder / f"{TEACHER[:32]}-float16"
    inside.mkdir(parents=True)
    (inside / "manifest.json").write_text(
        json.dumps({"teacher": TEACHER, "dim": DIM, "dtype": "float16", "name": "x"})
    )
    names = sorted(range(20), key=lambda name: keys_of([name]))
    features = features_of(names).half().numpy()
    keys = np.frombuffer(b"".join(keys_of(names)), np.uint8).reshape(20, 16)
    checksums = np.array([zlib.crc32(row.tobytes()) for row in features], np.uint32)
    tensors = {"keys": keys, "checksums": checksums, "features": features}
    index = zlib.crc32(keys.tobytes() + checksums.tobytes())
    (inside / "0.safetensors").write_bytes(save(tensors, metadata={"index_crc32": str(index)}))
    assert holds(opened(shutil.move(folder, tmp_path / "elsewhere")), range(20))


def test_keys_with_zero_bytes_are_told_apart(cache, folder):
    keys = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1", b"\xff" * 16, b"\0\xff" * 8]
    cache.put(keys, features_of(range(5)))
    cache.flush()
    reader = opened(folder)
    assert torch.equal(torch.stack(reader.get(keys)), features_of(range(5)).half())
    assert reader.get([b"\1" + bytes(14) + b"\1"]) == [None]


def test_the_first_feature_of_a_key_stays(cache):
    put(cache, [1])
    for _ in range(2):
        returned = cache.put(keys_of([1, 2, 2]), features_of([7, 2, 8]))
        assert torch.equal(returned, features_of([1, 2, 2]).half())
        assert holds(cache, [1, 2])
        cache.flush()
    assert len(cache) == 2
    assert len(shard_files(cache)) == 1


def test_what_the_caller_does_with_its_tensors_does_not_reach_the_cache(cache):
    features = features_of([1, 2])
    returned = cache.put(keys_of([1, 2]), features)
    features.zero_(), returned.zero_()
    cache.flush()
    cache.get(keys_of([1]))[0].zero_()
    assert holds(cache, [1, 2])


def test_waiting_features_are_written_when_there_are_enough(folder, cache, flush_rows):
    flush_rows(10)
    for name in range(25):
        put(cache, [name])
    assert len(shard_files(cache)) == 2
    assert len(opened(folder)) == 20


def test_teachers_do_not_mix_and_the_manifest_names_the_teacher(folder):
    cache = FeatureCache(folder, TEACHER, DIM, teacher_name="some-org/teacher")
    store(cache, [1])
    assert FeatureCache(folder, "b" * 64, DIM).get(keys_of([1])) == [None]
    expected = {"teacher": TEACHER, "dim": DIM, "dtype": "float16", "name": "some-org/teacher"}
    assert json.loads((cache.folder / "manifest.json").read_text()) == expected


def test_a_wrong_shape_is_refused(cache):
    with pytest.raises(ValueError, match=r"not \[n, 8\]"):
        cache.put(keys_of([1, 2]), features_of([1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_feature_that_is_not_finite_in_float16_is_refused_with_its_key(value, cache):
    features = features_of([1, 2])
    features[1, 3] = value
    with pytest.raises(ValueError, match=f"{keys_of([2])[0].hex()} is not finite in float16.*hera_teacher_cache"):
        cache.put(keys_of([1, 2]), features)
    assert len(cache) == 0


def test_shards_of_nothing_or_of_nan_are_left_out(cache):
    nothing = {"keys": np.zeros((0, 16), np.uint8), "checksums": np.zeros(0, np.uint32)}
    nothing["features"] = np.zeros((0, DIM), np.float16)
    save_file(nothing, cache.folder / "0.safetensors", {"index_crc32": "0"})
    write_shard(cache.folder / "1.safetensors", key_array(keys_of([1])), np.full((1, DIM), np.nan, np.float16))
    cache.refresh()
    assert cache.get(keys_of([1])) == [None]
    assert {path.suffix for path in cache.folder.glob("[01].*")} == {".corrupt"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"hera_teacher_cache: .*file/inner cannot be written"):
        FeatureCache(tmp_path / "file" / "inner", TEACHER, DIM)


# damage


def flip_last_bit(content, block):
    """Damages the last row of a block of a shard."""
    content = bytearray(content)
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[block]["data_offsets"][1] - 1] ^= 1
    return content


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a shard at all",
    "header": lambda content: content[:20] + b"\xff" * 20 + content[40:],
    "longer": lambda content: content + b"\0",
    **{block: partial(flip_last_bit, block=block) for block in ("features", "checksums", "keys")},
}


@pytest.mark.parametrize("damage", [*DAMAGE, "width"])
def test_a_damaged_shard_is_left_out_with_a_warning_at_the_latest_when_its_rows_are_read(
    damage, cache, folder, caplog
):
    store(cache, [3])
    broken = cache.folder / "0.safetensors"
    width = DIM + 1 if damage == "width" else DIM
    write_shard(broken, key_array(keys_of([1, 2])), np.ones((2, width), np.float16))
    if damage != "width":
        broken.write_bytes(DAMAGE[damage](broken.read_bytes()))
    reader = opened(folder)
    assert reader.get(keys_of([1, 2])) == [None, None]
    assert holds(reader, [3])
    assert len(reader) == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(broken) in record.message
    assert "will be computed again" in record.message
    # the next reader does not stumble over it again, and what was lost can be stored again
    caplog.clear()
    store(reader, [1, 2])
    assert holds(opened(folder), [1, 2, 3])
    assert not caplog.records


# several processes


def test_readers_and_pickled_copies_hold_no_features_in_memory_and_see_after_refresh_what_others_wrote(cache):
    store(cache, range(2000))
    put(cache, [5000])
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 500
    assert holds(copy, range(2000))
    # what waits belongs to the process that computed it
    assert copy.get(keys_of([5000])) == [None]
    assert sum(shard.keys.nbytes + shard.checksums.nbytes for shard in copy._shards.values()) == 2000 * 20
    cache.flush()
    assert copy.get(keys_of([5000])) == [None]
    copy.refresh()
    assert holds(copy, [5000])


def test_loader_workers_read_it_at_the_same_time(cache, flush_rows):
    flush_rows(30)
    for name in range(200):
        put(cache, [name])
    cache.flush()
    loader = DataLoader(range(200), 8, num_workers=2, collate_fn=lambda names: torch.stack(cache.get(keys_of(names))))
    assert torch.equal(torch.cat(list(loader)), features_of(range(200)).half())


@pytest.mark.parametrize("when", ["while writing", "before the rename"])
def test_a_killed_writer_leaves_no_shard_and_its_leftover_is_swept(when, folder, cache):
    store(cache, [1])

    def child():
        if when == "before the rename":
            os.replace = lambda *args: os.kill(os.getpid(), signal.SIGXFSZ)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        store(cache, [2])

    run([fork.Process(target=child)], -signal.SIGXFSZ)
    (leftover,) = cache.folder.glob(".writing-*")
    reader = opened(folder)
    assert holds(reader, [1])
    assert reader.get(keys_of([2])) == [None]
    # it may still have a writer; an hour later it has not
    assert leftover.exists()
    os.utime(leftover, (time.time() - 4000,) * 2)
    opened(folder)
    assert not leftover.exists()


@pytest.mark.parametrize("when", ["while writing", "at the rename"])
def test_a_full_disk_is_named_leaves_no_partial_file_and_loses_nothing(when, folder):
    def child():
        cache = FeatureCache(folder, TEACHER, 4096)
        cache.put(keys_of(range(40)), torch.ones(40, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        replace = os.replace
        if when == "while writing":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        else:
            os.replace = lambda *args: os.listdir("/no/such/folder")
        with pytest.raises(OSError, match=f"40 teacher features cannot be written to {folder}.*Free space"):
            cache.flush()
        assert [path.name for path in cache.folder.iterdir()] == ["manifest.json"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.replace = replace
        cache.flush()

    run([fork.Process(target=child)])
    assert len(FeatureCache(folder, TEACHER, 4096)) == 40


def test_a_read_only_cache_can_be_read(folder, cache, monkeypatch):
    store(cache, [1])
    # the user of these tests may be root, whom permissions do not stop
    original = type(cache.folder).open

    def refuse(path, mode="r", *args, **kwargs):
        if mode not in ("r", "rb"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(type(cache.folder), "open", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert holds(opened(folder), [1])


# merging


@pytest.fixture
def few_shards(monkeypatch):
    monkeypatch.setattr(cache_module, "_MAX_SMALL_SHARDS", 5)


def write_many(folder, names, per_shard=1):
    cache = opened(folder)
    for start in range(0, len(names), per_shard):
        store(cache, names[start : start + per_shard])
    return cache


def test_many_small_shards_are_merged_on_opening(folder, few_shards):
    cache = write_many(folder, range(20))
    assert len(shard_files(cache)) == 20
    reader = opened(folder)
    assert len(shard_files(reader)) == 1
    assert holds(reader, range(20))
    assert len(reader) == 20
    # an older reader follows when it misses a file
    assert len(cache._shards) == 20
    assert holds(cache, range(20))
    assert len(cache._shards) == 1


def test_merged_shards_keep_to_their_size_and_few_or_large_ones_are_left_alone(folder, few_shards, monkeypatch):
    write_many(folder, range(5))
    assert len(shard_files(opened(folder))) == 5
    write_many(folder, range(5, 40))
    with monkeypatch.context() as context:
        context.setattr(cache_module, "_FLUSH_ROWS", 1)
        assert len(shard_files(opened(folder))) == 40
    monkeypatch.setattr(cache_module, "_MERGED_ROWS", 10)
    reader = opened(folder)
    assert len(shard_files(reader)) == 4
    assert holds(reader, range(40))


def test_merging_reports_damaged_shards_and_keeps_the_rest(folder, few_shards, caplog):
    cache = write_many(folder, range(20), per_shard=2)
    broken = shard_files(cache)[3]
    # numpy takes NULs at the end of its strings for padding
    lost = {bytes(key).ljust(16, b"\0") for key in Shard(broken, DIM).keys}
    broken.write_bytes(flip_last_bit(broken.read_bytes(), "features"))
    reader = opened(folder)
    assert len(shard_files(reader)) == 1
    assert reader.get(sorted(lost)) == [None, None]
    assert str(broken) in caplog.text
    assert holds(reader, [name for name in range(20) if keys_of([name])[0] not in lost])


def test_processes_that_merge_the_same_shards_at_once_write_the_same_file(folder, few_shards):
    cache = write_many(folder, range(20))
    barrier = fork.Barrier(3)

    def child():
        # all have seen the parts before anyone writes, and have written before anyone unlinks
        write, unlink = cache_module.write_shard, type(cache.folder).unlink
        cache_module.write_shard = lambda *args: (barrier.wait(20), write(*args), barrier.wait(20))
        type(cache.folder).unlink = lambda path, missing_ok=False: unlink(path, missing_ok=True)
        assert holds(opened(folder), range(20))

    run([fork.Process(target=child) for _ in range(3)])
    assert len(shard_files(cache)) == 1
    assert holds(opened(folder), range(20))


@pytest.mark.parametrize("step", ["__init__", "read"])
def test_shards_that_another_process_merges_meanwhile_are_followed(step, folder, few_shards, monkeypatch):
    # between listing and opening them, or before reading them for a merge of one's own
    write_many(folder, range(20))
    original = getattr(Shard, step)

    def overtaken(*args):
        monkeypatch.setattr(Shard, step, original)
        opened(folder)
        return original(*args)

    monkeypatch.setattr(Shard, step, overtaken)
    cache = opened(folder)
    assert len(cache._shards) == len(shard_files(cache)) == 1
    assert holds(cache, range(20))


def test_a_merge_killed_halfway_loses_nothing(folder, few_shards):
    cache = write_many(folder, range(20))

    def child():
        type(cache.folder).unlink = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        opened(folder)

    run([fork.Process(target=child)], -signal.SIGKILL)
    # the merged shard stands beside its parts
    assert len(shard_files(cache)) == 21
    reader = opened(folder)
    assert holds(reader, range(20))
    assert len(reader) == 20
    assert len(shard_files(reader)) == 1


def test_several_processes_open_merge_and_write_at_once_and_nothing_is_lost(folder, few_shards):
    write_many(folder, range(30))
    barrier = fork.Barrier(2)

    def child(start):
        barrier.wait(20)
        for first in range(start, start + 60, 6):
            write_many(folder, range(first, first + 6))
            assert holds(opened(folder), range(30))

    # their images overlap: 1030 to 1059 are computed by both
    run([fork.Process(target=child, args=(start,)) for start in (1000, 1030)])
    cache = opened(folder)
    assert holds(cache, [*range(30), *range(1000, 1090)])
    assert len(cache) == 120
