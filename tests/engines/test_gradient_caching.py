"""Gradient caching: micro-batches together give the gradients of the large batch, dropout and all."""

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.training.random_state import RandomState

from .cells import gradients
from .compare import BOUND, expected_gradients, relative_error
from .step import LOSSES, Step
from .tiny import CHECKPOINTING, DATA, ENGINE_NAMES, Batch, batches, build
from .workers import WorkerPair


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_gradient_caching_gives_the_gradients_of_the_large_batch(
    workers: WorkerPair, engine: str, checkpointing: str
) -> None:
    data = DATA[:2]
    found = workers.run(gradients, engine, "lora", checkpointing, data, 2)
    for case in data:
        for loss, expected in expected_gradients("lora", case).items():
            assert relative_error(found[0][case][loss], expected) <= BOUND, (case, loss)


def _with_one_graph(model: nn.Module, micro_batches: list[Batch], weights: tuple[float, float]) -> dict[str, Tensor]:
    """The same loss without caching: the graphs of all micro-batches are kept, for one backward pass."""
    step = Step(model)
    lm_losses, representations = zip(*[step.forward(model, batch) for batch in micro_batches], strict=True)
    teacher = torch.cat([batch.teacher for batch in micro_batches])
    valid = torch.cat([batch.valid for batch in micro_batches])
    output = step.term(torch.cat(representations, dim=1), teacher, valid)
    (weights[0] * torch.stack(lm_losses).mean() + weights[1] * output.loss).backward()
    step.capture.remove()
    return _take_gradients(model, step)


def _take_gradients(model: nn.Module, step: Step) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found | step.take_own_gradients()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_dropout_is_repeated(checkpointing: str) -> None:
    model = build("lora", checkpointing, dropout=0.3)
    micro_batches = batches("one rank without", 2)[1]
    weights = LOSSES["both"]
    state = RandomState(torch.device("cpu"))
    expected = _with_one_graph(model, micro_batches, weights)
    after = torch.get_rng_state()
    state.restore()
    step = Step(model)
    for loss in step.cached_losses(model, micro_batches, weights):
        loss.backward()
        step.capture.pool(None)
    assert relative_error(_take_gradients(model, step), expected) <= BOUND
    # what is drawn afterwards is what would be drawn without caching
    assert torch.get_rng_state().equal(after)


def test_a_pass_that_cannot_be_repeated_is_refused() -> None:
    model = build("lora", "off", dropout=0.3)
    losses = Step(model).cached_losses(model, batches("images", 2)[1], LOSSES["both"], repeat=False)
    with pytest.raises(RuntimeError, match=r"hera_accumulate: gradcache .* is not repeated"):
        next(losses)


def test_every_part_shows_the_value_of_the_whole() -> None:
    model = build("full", "off")
    whole, parts = batches("images", 2)
    weights = LOSSES["hera"]
    step = Step(model)
    expected = step.loss(model, whole, weights)
    step.capture.remove()
    losses = list(Step(model).cached_losses(model, parts, weights))
    assert [loss.item() * len(parts) for loss in losses] == pytest.approx([expected.item()] * len(parts), rel=1e-5)
