"""Every engine, tuning type and kind of checkpointing gives the gradients of one process with the global batch.

The tests run in fp32 on a CPU with two gloo processes, for ``L_LM + weight * L_HeRA`` and for ``L_HeRA`` alone. They
use the engines' own APIs, because accelerate falls back from FSDP to DDP on a CPU.
"""

import pytest
import torch

from .cells import TAU, Gradients, aligner_of, gradients, remembered, sliced_reference
from .compare import BOUND, expected_gradients, relative_error
from .tiny import CHECKPOINTING, DATA, ENGINE_NAMES, RANKS, TUNINGS, batches, build
from .workers import WorkerError, WorkerPair

pytestmark = pytest.mark.slow


class _Cells:
    """The gradients of each cell; an engine wraps a model once for all kinds of data."""

    def __init__(self, workers: WorkerPair) -> None:
        self._workers = workers
        self._answers: dict[tuple[str, ...], list[Gradients] | Exception] = {}

    def __call__(self, *cell: str) -> list[Gradients]:
        if cell not in self._answers:
            try:
                self._answers[cell] = self._workers.run(gradients, *cell, DATA)
            except (WorkerError, TimeoutError) as error:
                self._answers[cell] = error
        answer = self._answers[cell]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(scope="module")
def cells(workers: WorkerPair) -> _Cells:
    return _Cells(workers)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_gradients_equal_those_of_one_process(
    cells: _Cells, errors: dict, engine: str, tuning: str, checkpointing: str, data: str
) -> None:
    expected = expected_gradients(tuning, data)
    found = cells(engine, tuning, checkpointing)
    by_loss = {loss: relative_error(found[0][data][loss], expected[loss]) for loss in expected}
    errors[engine, tuning, checkpointing, data] = max(by_loss.values())
    assert max(by_loss.values()) <= BOUND, by_loss
    for rank in range(1, RANKS):  # no engine reduces the temperature's gradient, so the ranks must agree on it
        for loss in expected:
            here, first = float(found[rank][data][loss][TAU]), float(found[0][data][loss][TAU])
            assert here == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_reference_depends_on_hera_if_there_are_images(tuning: str) -> None:
    for data in DATA:
        hera = expected_gradients(tuning, data)["hera"]
        largest = max(float(tensor.abs().max()) for tensor in hera.values())
        assert largest == 0 if data == "text only" else largest > 1e-2
        assert (hera[TAU] != 0) == (data != "text only")


@pytest.mark.parametrize("tuning", ["full", "lora", "freeze", "projector"])
def test_reference_equals_slicing_the_weight(tuning: str) -> None:
    whole, _ = batches("one rank without")
    expected = sliced_reference(build(tuning, "off"), whole)
    found = {
        name: tensor for name, tensor in expected_gradients(tuning, "one rank without")["hera"].items() if name != TAU
    }
    assert relative_error(found, expected) <= BOUND


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_ranks_with_batches_of_different_size(workers: WorkerPair, engine: str) -> None:
    # each rank's LM loss has equal weight regardless of its size, so only the HeRA term equals the global batch's
    expected = expected_gradients("full", "uneven")
    found = workers.run(gradients, engine, "full", "off", ("uneven",))
    assert relative_error(found[0]["uneven"]["hera"], expected["hera"]) <= BOUND


def test_memory_is_equal_on_all_ranks_and_to_one_process(workers: WorkerPair) -> None:
    expected = remembered(10)
    for found in workers.run(remembered, 10):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape
            assert float((found[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max())
    # 8 samples with an image in the first batch, 4 in the second, none in the third: the last 10 of these 12
    aligner = aligner_of(build("full", "off"))
    first, second = (aligner.teacher.features(batches(data)[0].teacher) for data in ("images", "one rank without"))
    torch.testing.assert_close(expected["memory.teacher"], torch.cat([first[2:], second[:4]]))
