"""Batches: every sample once, longest first, and halved when memory runs out."""

import pytest
import torch

from llamafactory_hera.selection.batches import plan_batches, run_batches

FEATURES = [{"input_ids": [row] * (1 + row % 5)} for row in range(21)]


def collate(features):
    features = [feature.pop("input_ids") for feature in features]  # the host's collator takes samples apart, too
    return {"rows": [ids[0] for ids in features]}


def plan(batch_size=8):
    return plan_batches([len(feature["input_ids"]) for feature in FEATURES], batch_size)


@pytest.mark.parametrize("batch_size", [1, 8, 21, 64])
def test_each_sample_is_in_one_batch_longest_first(batch_size):
    batches = plan(batch_size)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(21))
    lengths = [len(FEATURES[row]["input_ids"]) for row in rows]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch.rows) <= batch_size for batch in batches)


def test_blocks_are_whole_batches_of_about_32_samples():
    batches = plan_batches([1] * 100, 12)
    assert [batch.block for batch in batches] == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_batches_run_in_order():
    seen = [(batch.rows, result) for batch, result in run_batches(plan(), FEATURES, collate, lambda b: b["rows"])]
    assert seen == [(batch.rows, list(batch.rows)) for batch in plan()]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_batches_are_halved_when_memory_runs_out(error, caplog):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        if len(batch["rows"]) > 3:
            raise error
        return batch["rows"]

    seen = [(batch, result) for batch, result in run_batches(plan(), FEATURES, collate, run)]
    assert sorted(row for _, rows in seen for row in rows) == list(range(21))
    assert all(list(batch.rows) == result for batch, result in seen)
    assert tried[:3] == [8, 4, 2]
    assert tried.count(8) == tried.count(4) == 1  # what is to come is halved, too
    assert "batches of 4 samples" in caplog.text
    assert "batches of 2 samples" in caplog.text
    blocks = {row: batch.block for batch in plan() for row in batch.rows}
    assert all(blocks[row] == batch.block for batch, _ in seen for row in batch.rows)


def test_one_sample_that_does_not_fit_is_an_error():
    def run(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        list(run_batches(plan(), FEATURES, collate, run))


def test_another_error_is_not_mistaken_for_memory():
    def run(batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(run_batches(plan(), FEATURES, collate, run))
