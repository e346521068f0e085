"""Gradient caching gives the gradients of one large batch, and repeats dropout."""

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.training import Aligner
from llamafactory_hera.training.gradcache import keep_random_state

from .cells import LOSSES, aligner_of, cached_losses, gradients, take_objective_gradients
from .compare import BOUND, expected_gradients, relative_error
from .tiny import CHECKPOINTING, DATA, ENGINE_NAMES, HEADS, batches, build
from .workers import WorkerPair

#: Engine, checkpointing, objective, targets.
CELLS = [(engine, kind, "contrastive", HEADS) for engine in ENGINE_NAMES for kind in CHECKPOINTING]
CELLS += [("DDP", "reentrant", "cka", targets) for targets in (HEADS, "L1,L2")]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "checkpointing", "objective", "targets"), CELLS)
def test_gradient_caching_gives_the_gradients_of_the_large_batch(
    workers: WorkerPair, engine: str, checkpointing: str, objective: str, targets: str
) -> None:
    data = DATA[:2]
    found = workers.run(gradients, engine, "lora", checkpointing, data, 2, objective, targets)
    for case in data:
        for loss, expected in expected_gradients("lora", case, objective, targets).items():
            assert relative_error(found[0][case][loss], expected) <= BOUND, (case, loss)


def _take_gradients(model: nn.Module, aligner: Aligner) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found | take_objective_gradients(aligner)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_dropout_is_repeated(checkpointing: str) -> None:
    model = build("lora", checkpointing, dropout=0.3)
    micro_batches = batches("one rank without", 2)[1]
    weights = LOSSES["both"]
    aligner, other = aligner_of(model), aligner_of(model)  # loading a teacher draws random numbers
    restore = keep_random_state(torch.device("cpu"))
    # the same loss without caching: one backward pass through the graphs of all micro-batches
    lm_losses, representations, teacher, valid = [], [], [], []
    for batch in micro_batches:
        micro_batch = other.prepare({**batch.inputs, **batch.teacher})
        lm_losses.append(model(**batch.inputs).loss)
        representations.append(other.capture.representations())
        teacher.append(other.teacher.features(micro_batch.inputs))
        valid.append(micro_batch.valid)
    output = other.term(torch.cat(representations, dim=1), torch.cat(teacher), torch.cat(valid))
    (weights[0] * torch.stack(lm_losses).mean() + weights[1] * output.loss).backward()
    other.capture.remove()
    expected = _take_gradients(model, other)
    after = torch.get_rng_state()
    restore()
    for loss in cached_losses(aligner, model, micro_batches, weights):
        loss.backward()
        aligner.after_backward()
    assert relative_error(_take_gradients(model, aligner), expected) <= BOUND
    # the random state afterwards is the same as without caching
    assert torch.get_rng_state().equal(after)


def test_a_pass_that_cannot_be_repeated_is_refused() -> None:
    model = build("lora", "off", dropout=0.3)
    losses = cached_losses(aligner_of(model), model, batches("images", 2)[1], LOSSES["both"], repeat=False)
    with pytest.raises(RuntimeError, match=r"hera_accumulate: gradcache .* new random numbers in the second pass"):
        next(losses)
