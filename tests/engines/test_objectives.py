"""On every engine, every objective on heads or layers has the gradients of one process with the global batch."""

import pytest
import torch

from .cells import gradients
from .compare import BOUND, expected_gradients, relative_error
from .tiny import DATA, HEADS, RANKS
from .workers import WorkerPair

pytestmark = pytest.mark.slow

LAYERS = "L1,L2"
ENGINES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
#: Objective, targets, checkpointing. A checkpointed layer's output carries gradients only outside the checkpoint.
CASES = {
    "feature, heads": ("feature", HEADS, "reentrant"),
    "feature, heads, no checkpointing": ("feature", HEADS, "off"),
    "cka, heads": ("cka", HEADS, "off"),
    "contrastive, layers": ("contrastive", LAYERS, "non-reentrant"),
    "cka, layers": ("cka", LAYERS, "reentrant"),
    "viral, layers": ("viral", LAYERS, "reentrant"),
    "viral, one layer": ("viral", "L1", "off"),
    "gram, layers": ("gram", LAYERS, "non-reentrant"),
    "ross": ("ross", "final", "reentrant"),
    "jarvis": ("jarvis", "L1", "reentrant"),
    "jarvis, no checkpointing": ("jarvis", "L1", "off"),
}


#: Full fine-tuning on every engine, and LoRA on the two engines that differ most. LoRA is omitted for layers without
#: checkpointing, because reading a layer does not depend on adapters inside it.
CELLS = [(case, "full", engine) for case in CASES for engine in ENGINES[: 1 if "no checkpointing" in case else 4]]
ADAPTED = [case for case, (_, targets, kind) in CASES.items() if "H" in targets or kind != "off"]
CELLS += [(case, "lora", engine) for case in ADAPTED for engine in ("DDP", "ZeRO-3")]


@pytest.mark.parametrize(("case", "tuning", "engine"), CELLS)
def test_gradients_equal_those_of_one_process(workers: WorkerPair, engine: str, tuning: str, case: str) -> None:
    objective, targets, checkpointing = CASES[case]
    found = workers.run(gradients, engine, tuning, checkpointing, DATA, 1, objective, targets)
    for data in DATA:
        for loss, expected in expected_gradients(tuning, data, objective, targets).items():
            assert relative_error(found[0][data][loss], expected) <= BOUND, (data, loss)
            # no engine reduces the gradients of the objective's parameters, so the ranks must agree on them
            for rank in range(1, RANKS):
                for name, gradient in found[rank][data][loss].items():
                    assert torch.equal(gradient, found[0][data][loss][name])


@pytest.mark.parametrize("case", ["feature, heads", "ross", "jarvis"])
def test_gradients_with_4_bit_weights_equal_those_of_one_process(workers: WorkerPair, case: str) -> None:
    test_gradients_equal_those_of_one_process(workers, "DDP", "qlora", case)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_depends_on_the_objective_if_there_are_images(case: str) -> None:
    objective, targets, _ = CASES[case]
    for data in DATA:
        hera = expected_gradients("full", data, objective, targets)["hera"]
        largest = max(float(tensor.abs().max()) for tensor in hera.values())
        assert largest == 0 if data == "text only" else largest > 1e-3
