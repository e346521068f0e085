"""Every engine, tuning type and kind of checkpointing gives the gradients of one process with the global batch.

The tests run in fp32 on a CPU with two gloo processes, for ``L_LM + weight * L_HeRA`` and for ``L_HeRA`` alone. They
use the engines' own APIs, because accelerate falls back from FSDP to DDP on a CPU.
"""

import pytest

from .cells import TAU, gradients
from .compare import BOUND, HALF_BOUND, HALF_ZERO, expected_gradients, relative_error
from .tiny import CHECKPOINTING, DATA, ENGINE_NAMES, HEADS, RANKS, TUNINGS
from .workers import WorkerPair

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("engine", ENGINE_NAMES)
@pytest.mark.parametrize("tuning", TUNINGS)
def test_gradients_equal_those_of_one_process(
    workers: WorkerPair, errors: dict, engine: str, tuning: str, checkpointing: str
) -> None:
    found = workers.run(gradients, engine, tuning, checkpointing, DATA)
    for data in DATA:
        expected = expected_gradients(tuning, data)
        by_loss = {loss: relative_error(found[0][data][loss], expected[loss]) for loss in expected}
        errors[engine, tuning, checkpointing, data] = max(by_loss.values())
        assert max(by_loss.values()) <= BOUND, (data, by_loss)
        for rank in range(1, RANKS):  # no engine reduces the temperature's gradient, so the ranks must agree on it
            for loss in expected:
                here, first = float(found[rank][data][loss][TAU]), float(found[0][data][loss][TAU])
                assert here == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("engine", [name for name in ENGINE_NAMES if name != "DDP, static"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_half_precision_only_rounds_gradients(workers: WorkerPair, engine: str, tuning: str, precision: str) -> None:
    if (engine, tuning, precision) == ("FSDP1", "lora", "bf16"):
        pytest.skip("FSDP1 cannot return the bf16 gradients of a layer with frozen parameters")
    expected = expected_gradients(tuning, "images", precision=precision)
    for checkpointing in CHECKPOINTING:
        found = workers.run(gradients, engine, tuning, checkpointing, ("images",), 1, "contrastive", HEADS, precision)
        for loss, values in expected.items():
            assert relative_error(found[0]["images"][loss], values, HALF_ZERO) <= HALF_BOUND, (checkpointing, loss)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_reference_depends_on_hera_if_there_are_images(tuning: str) -> None:
    for data in DATA:
        hera = expected_gradients(tuning, data)["hera"]
        largest = max(float(tensor.abs().max()) for tensor in hera.values())
        assert largest == 0 if data == "text only" else largest > 1e-2
        assert (hera[TAU] != 0) == (data != "text only")


@pytest.mark.parametrize(("data", "n_micro"), [("uneven", 1), ("packed", 1), ("packed", 2)])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_uneven_ranks_give_the_global_hera_gradient(workers: WorkerPair, engine: str, data: str, n_micro: int) -> None:
    # every rank's LM loss has the same weight whatever its size, so only the HeRA term equals the global batch's
    expected = expected_gradients("full", data)
    found = workers.run(gradients, engine, "full", "off", (data,), n_micro)
    assert relative_error(found[0][data]["hera"], expected["hera"]) <= BOUND
