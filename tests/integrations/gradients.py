"""Helpers for tests that compare gradients in a Trainer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from llamafactory_hera.training import Aligner


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the last step before the optimizer uses them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def token_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss function that averages over the tokens of all micro-batches."""
    loss = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def run(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains, and returns the gradients of the last step and the first log line."""
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.train()
    return keep.found, trainer.state.log_history[0]


def expected_term(trainer: Any, together: bool) -> tuple[dict[str, Tensor], float]:
    """Computes a Trainer's mean term over micro-batches, or if ``together`` one term of all, with a bare Aligner."""
    model, terms = trainer.model, []
    aligner = Aligner(model, trainer.aligner.config)
    for batch in trainer.get_train_dataloader():
        prepared = aligner.prepare(batch)
        model(**batch)
        terms.append((aligner.capture.representations(), aligner.teacher.features(prepared.inputs), prepared.valid))
        aligner.capture.pool(None)
    if together:
        z, features, valid = zip(*terms, strict=True)
        terms = [(torch.cat(z, dim=1), torch.cat(features), torch.cat(valid))]
    mean = torch.stack([aligner.term(*parts).loss for parts in terms]).mean()
    mean.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    aligner.close()
    return found, mean.item()


def check_term(make: Callable[[float], Any], together: bool, tolerance: float) -> dict[str, float]:
    """Checks that the term with weight 0.5 adds only its gradient and its value; returns the log line."""
    trainer = make(0.5)
    expected, term = expected_term(trainer, together)
    (with_term, logged), (without, _) = run(trainer), run(make(0.0))
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    largest = max(gradient.abs().max().item() for gradient in with_term.values())
    for name, gradient in expected.items():
        difference = with_term[name] - without[name]
        torch.testing.assert_close(difference, 0.5 * gradient, rtol=0, atol=tolerance * largest)
    assert logged["hera_loss"] == pytest.approx(term, abs=1e-4)
    assert logged["loss"] == pytest.approx(logged["lm_loss"] + 0.5 * term, abs=1e-3)
    return logged
