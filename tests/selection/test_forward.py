"""The forward passes: every sample in one batch, longest first, halved when memory runs out; which logits are made."""

import pytest
import torch

from llamafactory_hera.selection.forward import Forward, plan_batches, run_batches
from tests.tiny_models import text_model

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


@pytest.mark.parametrize(
    ("error", "passes"), [(torch.OutOfMemoryError("CUDA out of memory."), 4), (RuntimeError("shapes do not fit"), 1)]
)
def test_one_sample_that_does_not_fit_and_any_other_error_are_raised(error, passes):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(run_batches(plan(), FEATURES, collate, run))
    assert tried == [8, 4, 2, 1][:passes]


@pytest.mark.parametrize("skips", [True, False], ids=["logits_to_keep", "without"])
def test_logits_are_those_of_the_positions(skips):
    model = text_model("qwen3").eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 9)), "labels": torch.zeros(2, 9, dtype=torch.long)}
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits
    forward = Forward(model)
    assert forward._can_skip_logits
    forward._can_skip_logits = skips
    positions = torch.tensor([1, 4, 8])
    with torch.no_grad():
        torch.testing.assert_close(forward.logits(batch, positions), expected[:, positions])


def test_the_language_model_alone_runs_without_a_head():
    model = text_model("qwen3").eval()
    model.lm_head.forward = None
    with torch.no_grad():
        Forward(model, "llm").run({"input_ids": torch.randint(3, 50, (2, 9)), "labels": None})
