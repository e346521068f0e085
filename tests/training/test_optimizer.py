"""The optimizer of an objective's parameters, compared with AdamW written out; skipped steps and resuming."""

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from llamafactory_hera.objectives.contrastive import Contrastive
from llamafactory_hera.training.optimizer import ObjectiveOptimizer
from tests.terms import options
from tests.tiny_models import same


class Temperature:
    """The contrastive objective's only parameter, and its optimizer."""

    def __init__(self, initial: float) -> None:
        self.objective = Contrastive(options(n_targets=1, dim=1, teacher_dim=1, temperature=initial))
        optimizer = ObjectiveOptimizer(self.objective)
        self.log_value = self.objective.log_temperature
        self.step, self.state, self.load_state = optimizer.step, optimizer.state, optimizer.load_state

    def __call__(self) -> Tensor:
        return self.objective.log_temperature.exp()

    @property
    def value(self) -> float:
        return self.objective.values()["hera_temperature"]


def train(temperature: Temperature, targets: list[float], learning_rate: float = 0.05) -> list[float]:
    """Pulls the temperature toward each target in turn, and returns the value after each step."""
    values = []
    for target in targets:
        (temperature() - target).square().backward()
        temperature.step(learning_rate)
        values.append(temperature.value)
    return values


def test_each_step_uses_the_learning_rate_of_that_step():
    temperature = Temperature(0.07)
    train(temperature, [1.0], learning_rate=0.0)
    assert temperature.value == pytest.approx(0.07, rel=1e-6)
    train(temperature, [1.0], learning_rate=0.1)
    assert temperature.value == pytest.approx(0.07 * math.exp(0.1), rel=1e-3)


def test_gradients_accumulate_until_the_step_and_are_then_cleared():
    temperature = Temperature(0.07)
    for _ in range(2):
        temperature().backward()
    temperature.step(0.01)
    assert temperature.log_value.grad is None
    after = temperature.value
    temperature.step(0.01)  # no gradient: no step
    assert temperature.value == after


@pytest.mark.parametrize("gradient", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(gradient):
    temperature, untouched = Temperature(0.07), Temperature(0.07)
    train(temperature, [0.5])
    train(untouched, [0.5])
    temperature.log_value.grad = torch.tensor(gradient)
    temperature.step(0.05)
    assert temperature.log_value.grad is None
    assert train(temperature, [0.5, 0.2]) == train(untouched, [0.5, 0.2])


def saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saves a state to bytes, and loads it again."""
    return load(save(state))


@pytest.mark.parametrize("through", [saved, dict], ids=["file", "memory"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_restored_temperature_continues_bit_for_bit(through, steps):
    before, after = [0.5, 0.02, 1.0][:steps], [0.3, 0.9, 0.1]
    straight, resumed = Temperature(0.07), Temperature(5.0)
    train(straight, before)
    train(resumed, [2.0] * 2)  # its earlier state must not matter
    state = straight.state()
    kept = saved(state)
    resumed.load_state(through(state))
    assert resumed.value == straight.value
    assert train(resumed, after) == train(straight, after)
    assert train(straight, before + after) == train(resumed, before + after)
    assert same(state, kept)  # later steps do not change a saved state
