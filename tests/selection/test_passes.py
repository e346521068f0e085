"""The forward passes: every sample in one batch, longest first, halved when memory runs out; which logits are made."""

import pytest
import torch

from llamafactory_hera.selection.passes import Forward, plan_batches, run_batches
from tests.tiny_models import text_model

FEATURES = [{"input_ids": [row] * (1 + row % 5)} for row in range(21)]


def collate(features):
    features = [feature.pop("input_ids") for feature in features]  # the host's collator takes samples apart, too
    return {"rows": [ids[0] for ids in features]}


PLAN = plan_batches([len(feature["input_ids"]) for feature in FEATURES], 8)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("batch_size", [1, 8, 21, 64])
def test_each_sample_is_in_one_batch_longest_first(batch_size):
    lengths = [len(feature["input_ids"]) for feature in FEATURES]
    batches = plan_batches(lengths, batch_size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(21))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


def test_batches_run_in_order():
    seen = list(run_batches(PLAN, FEATURES, collate, lambda batch: batch["rows"]))
    assert seen == [(batch, list(batch)) for batch in PLAN]


@pytest.mark.parametrize("error", [NO_MEMORY, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_batches_are_halved_when_memory_runs_out(error, caplog):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        if len(batch["rows"]) > 3:
            raise error
        return batch["rows"]

    seen = list(run_batches(PLAN, FEATURES, collate, run))
    assert [row for batch, _ in seen for row in batch] == [row for batch in PLAN for row in batch]
    assert all(list(batch) == result for batch, result in seen)
    assert tried[:3] == [8, 4, 2]
    assert tried.count(8) == tried.count(4) == 1  # what is to come is halved, too
    assert "batches of 4 samples" in caplog.text
    assert "batches of 2 samples" in caplog.text


@pytest.mark.parametrize(("error", "passes"), [(NO_MEMORY, 4), (RuntimeError("shapes do not fit"), 1)])
def test_one_sample_that_does_not_fit_and_any_other_error_are_raised(error, passes):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(run_batches(PLAN, FEATURES, collate, run))
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
