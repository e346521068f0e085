"""Forward passes: each sample runs once, batches halve if memory runs out, and only needed logits are computed."""

import pytest
import torch

from llamafactory_hera.selection.passes import Forward, plan_batches, run_batches
from tests.tiny_models import text_model

FEATURES = [{"input_ids": [row] * (1 + row % 5)} for row in range(21)]
LENGTHS = [len(feature["input_ids"]) for feature in FEATURES]
PLAN = plan_batches(LENGTHS, 8)
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


def collate(features):
    features = [feature.pop("input_ids") for feature in features]  # as collators of the hosts do
    return {"rows": [ids[0] for ids in features]}


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_each_sample_is_in_one_batch_longest_first(batch_size):
    batches = plan_batches(LENGTHS, batch_size)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(21))
    assert [LENGTHS[row] for row in rows] == sorted(LENGTHS, reverse=True)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}


@pytest.mark.parametrize("error", [NO_MEMORY, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_batches_are_halved_when_memory_runs_out(error, caplog):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        if len(batch["rows"]) > 3:
            raise error
        return batch["rows"]

    results = list(run_batches(PLAN, FEATURES, collate, run))
    assert [row for batch, _ in results for row in batch] == [row for batch in PLAN for row in batch]
    assert all(list(batch) == result for batch, result in results)
    assert tried[:3] == [8, 4, 2]
    assert tried.count(8) == tried.count(4) == 1  # the following batches are halved, too
    assert [message.split()[-2] for message in caplog.messages] == ["4", "2"]


@pytest.mark.parametrize(("error", "passes"), [(NO_MEMORY, 4), (RuntimeError("shapes do not fit"), 1)])
def test_a_single_sample_that_does_not_fit_and_any_other_error_are_raised(error, passes):
    tried = []

    def run(batch):
        tried.append(len(batch["rows"]))
        raise error

    with pytest.raises(type(error), match=str(error)):
        list(run_batches(PLAN, FEATURES, collate, run))
    assert tried == [8, 4, 2, 1][:passes]


@pytest.mark.parametrize("skips", [True, False], ids=["logits_to_keep", "without"])
def test_logits_match_those_of_a_full_pass_at_the_positions(skips):
    model = text_model("qwen3").eval()
    batch = {"input_ids": torch.randint(3, 50, (2, 9)), "labels": torch.zeros(2, 9, dtype=torch.long)}
    forward, positions = Forward(model), torch.tensor([1, 4, 8])
    assert forward._can_skip_logits
    forward._can_skip_logits = skips
    with torch.no_grad():
        expected = model(batch["input_ids"]).logits[:, positions]
        torch.testing.assert_close(forward.logits(batch, positions), expected)


def test_the_language_model_alone_runs_without_its_head():
    model = text_model("qwen3").eval()
    model.lm_head.forward = None
    with torch.no_grad():
        Forward(model, "llm").run({"input_ids": torch.randint(3, 50, (2, 9)), "labels": None})
