"""Two real processes compared with one process that has the whole batch; all cases share the two processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llamafactory_hera import distributed
from llamafactory_hera.distributed import common_row_count, gather_rows, mean_over_ranks, on_first, world_size
from llamafactory_hera.objectives import create
from llamafactory_hera.training.memory import CrossBatchMemory
from llamafactory_hera.training.optimizer import ObjectiveOptimizer
from tests.ranks import run_ranks
from tests.terms import ContrastiveTerm, options
from tests.waits import Waits

CPU = torch.device("cpu")
RANKS, D_IN, D, HEADS, D_TEACHER = 2, 5, 6, 2, 4
WEIGHTS = torch.arange(12.0).view(3, 4)

#: Case -> the samples of each rank, and a validity flag for each sample.
BATCHES: dict[str, tuple[list[range], list[bool]]] = {
    "even": ([range(4), range(4, 8)], [True] * 8),
    "uneven": ([range(2), range(2, 8)], [True] * 8),
    "invalid rows": ([range(4), range(4, 8)], [True, False, True, True, False, True, True, True]),
    "a rank without images": ([range(5), range(5, 8)], [True] * 5 + [False] * 3),
    "no image anywhere": ([range(3), range(3, 6)], [False] * 6),
}


def samples(step: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``[8, D_IN]`` and teacher features ``[8, D_TEACHER]``, the same in every process."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, D_IN, generator=generator), torch.randn(8, D_TEACHER, generator=generator)


def term_of(batch: str, rank: int | None, wrap: bool) -> dict[str, Tensor]:
    """Returns loss, statistics and gradients of two steps with a memory, for one rank or for the whole batch."""
    rows, valid = BATCHES[batch]
    mine = [i for part in rows for i in part] if rank is None else list(rows[rank])
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(D_IN, 7), nn.Tanh(), nn.Linear(7, HEADS * D))
    wrapped = DistributedDataParallel(module) if wrap else module
    memory = CrossBatchMemory(5)
    term = ContrastiveTerm(k=3, memory=memory)
    waits, n_rows = Waits(), None if batch == "uneven" else 6  # if uneven, the ranks agree on a size
    log_temperature = torch.tensor(-1.0, requires_grad=True)
    results = {}
    for step in range(2):
        module.zero_grad()
        log_temperature.grad = None
        inputs, teacher = (tensor[mine] for tensor in samples(step))
        heads = wrapped(inputs).unflatten(1, (HEADS, D)).transpose(0, 1)
        entering, temperature = torch.tensor(valid)[mine], log_temperature.exp()
        with waits:
            output = term(heads, teacher, entering, temperature, n_rows)
        output.loss.backward()
        if wrap:  # as ObjectiveOptimizer does
            dist.all_reduce(log_temperature.grad)
            log_temperature.grad /= RANKS
        results[f"loss {step}"] = output.loss.detach()
        results[f"mknn {step}"] = output.mknn
        results[f"samples {step}"] = output.n_samples
        results[f"gradient {step}"] = torch.cat([p.grad.flatten() for p in module.parameters()])
        results[f"temperature gradient {step}"] = log_temperature.grad.clone()
    results.update(memory.state_dict())
    assert sum(waits.ours.values()) == (2 if n_rows is None and wrap else 0), waits.ours
    return results


def refuse() -> None:
    raise ValueError(f"refused by {distributed.rank()}")


def plain_cases(number: int) -> dict[str, Tensor]:
    """Returns the results of the communication functions on this rank, without the term."""
    results = {"world size": torch.tensor(world_size())}
    results["rows"] = gather_rows(torch.arange(6.0).view(3, 2) + 100 * number)
    results["non-contiguous rows"] = gather_rows((torch.arange(6.0).view(2, 3) + 100 * number).t())
    results["integers"] = gather_rows(torch.tensor([number, 7], dtype=torch.uint8))
    results["largest"] = torch.tensor(common_row_count(3 + 4 * number, CPU))
    results["of the first"] = torch.tensor([distributed.rank(), on_first(distributed.rank)])
    with pytest.raises(ValueError, match="refused by 0"):
        on_first(refuse)
    with pytest.raises(ValueError, match=r"^per_device_train_batch_size: 1 is less than the 3 samples of this batch;"):
        ContrastiveTerm(k=1)(
            torch.zeros(1, 3, 2), torch.zeros(3, 2), torch.ones(3, dtype=torch.bool), torch.ones(()), 1
        )

    rows, others = torch.ones(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    other_side = others * 1  # made before the gather, so its backward pass runs after the gather's
    # the sum hands one gradient tensor to both sides: the other side must not see the reduction over ranks
    ((gather_rows(rows * 2) + other_side) * (number + 1)).sum().backward()
    results["gradient"], results["gradient of the other side"] = rows.grad, others.grad

    rows = torch.ones(2, 3, requires_grad=True)
    gathered = gather_rows(rows)
    seen = []
    gathered.register_hook(lambda gradient: seen.append(gradient.is_contiguous()))
    (gathered.t() * WEIGHTS).sum().backward()
    results["gradient of a transpose"], results["was contiguous"] = rows.grad, torch.tensor(seen)

    means = mean_over_ranks({"loss": math.nan if number else 3.0, "mknn": 0.25 + number, "lost": math.nan}, CPU)
    assert means.keys() == {"loss", "mknn"}
    results["means"] = torch.tensor([means["loss"], means["mknn"]])

    objective = create("contrastive", options(n_targets=1, dim=1, teacher_dim=1))
    optimizer = ObjectiveOptimizer(objective)
    for noise in (1e-9, -2e-9, 4e-9):  # only rounding, as if the term did not depend on the parameter
        objective.log_temperature.grad = torch.tensor(noise * (1 if number else -0.5))
        optimizer.step(0.05)
    results["temperature of a replica"] = objective.log_temperature.detach()
    return results


def all_cases(rank: int) -> dict[str, dict[str, Tensor]]:
    results = {"plain": plain_cases(rank)}
    for batch in BATCHES:
        dist.barrier()
        results[batch] = term_of(batch, rank, wrap=True)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(all_cases, RANKS, tmp_path_factory.mktemp("ranks"))


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert world_size() == 1
    assert gather_rows(rows) is rows
    assert (distributed.rank(), on_first(distributed.rank)) == (0, 0)


@pytest.mark.slow
def test_every_rank_receives_the_rows_in_rank_order(ranks):
    for result in (rank["plain"] for rank in ranks):
        assert result["world size"] == RANKS
        first = torch.arange(6.0).view(3, 2)
        assert torch.equal(result["rows"], torch.cat([first, first + 100]))
        first = torch.arange(6.0).view(2, 3).t()
        assert torch.equal(result["non-contiguous rows"], torch.cat([first, first + 100]))
        assert result["integers"].tolist() == [0, 7, 1, 7]
        assert result["largest"] == 7
    assert [rank["plain"]["of the first"].tolist() for rank in ranks] == [[0, 0], [1, 0]]


@pytest.mark.slow
def test_the_gradient_of_a_rank_is_its_slice_of_the_sum_over_ranks_even_if_it_is_not_contiguous(ranks):
    for rank, result in enumerate(rank["plain"] for rank in ranks):
        assert torch.equal(result["gradient"], torch.full((2, 3), 2.0 * (1 + 2)))
        assert torch.equal(result["gradient of the other side"], torch.full((4, 3), rank + 1.0))
        assert not result["was contiguous"].any()
        expected = RANKS * WEIGHTS.t()[2 * rank : 2 * rank + 2]
        assert torch.equal(result["gradient of a transpose"], expected)


@pytest.mark.slow
def test_a_mean_ignores_ranks_without_a_value(ranks):
    assert [rank["plain"]["means"].tolist() for rank in ranks] == [[3.0, 0.75]] * 2


@pytest.mark.slow
def test_objective_parameters_stay_equal_if_gradients_differ_by_rounding(ranks):
    first, second = (rank["plain"]["temperature of a replica"] for rank in ranks)
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_data_parallel_ranks_compute_the_term_of_one_process_with_the_global_batch(ranks, batch):
    expected = term_of(batch, None, wrap=False)
    for result in (rank[batch] for rank in ranks):
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                result[name], value, rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
            )
    if batch != "no image anywhere":
        assert expected["gradient 1"].abs().max() > 1e-3
        assert expected["temperature gradient 1"].abs() > 1e-3
