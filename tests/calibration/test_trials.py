"""Updates within the trust region, on a real model."""

import pytest
import torch

from llamafactory_hera.calibration.edits import Edit, Update, applied
from llamafactory_hera.calibration.forward import Forward
from llamafactory_hera.calibration.held_out import HeldOut
from llamafactory_hera.calibration.settings import RahSettings
from llamafactory_hera.calibration.trials import try_updates
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.heads import Target
from tests.calibration.tiny import Rows, calibration_model, collate, noise_images


@pytest.fixture
def parts() -> tuple[HeadWeights, HeldOut, list[Update]]:
    model = calibration_model()
    weights = HeadWeights(model)
    rows = Rows([[image] for image in noise_images(4)])
    held_out = HeldOut(Forward(model), [rows.encode(row) for row in range(4)], collate, 4)
    updates = []
    for index in range(4):
        edit = Edit(1, "output", index, torch.randn(48, 2), torch.randn(2, 8))
        updates.append(Update((Target(1, index),), (edit,)))
    return weights, held_out, updates


def measured(weights: HeadWeights, held_out: HeldOut, steps: list) -> float:
    with applied(weights, steps):
        return held_out.kl()


def test_each_step_is_the_largest_that_holds_alone(parts: tuple) -> None:
    weights, held_out, updates = parts
    full = [measured(weights, held_out, [(update, 0.15)]) for update in updates]
    delta = sorted(full)[1] * 1.01  # two hold at once, two must be halved
    outcome = try_updates(updates, weights, held_out, RahSettings(delta=delta))
    for trial, update, kl in zip(outcome.trials, updates, full, strict=True):
        assert trial.update is update
        assert trial.tried[0] == (0.15, kl)
        assert (len(trial.tried) == 1) == (kl <= delta)
        for step in trial.tried:
            assert step.kl == measured(weights, held_out, [(update, step.alpha)])
        assert [step.kl <= delta for step in trial.tried] == [False] * (len(trial.tried) - 1) + [True]


def test_the_last_updates_are_given_up_until_the_total_holds(parts: tuple) -> None:
    weights, held_out, updates = parts
    delta = max(measured(weights, held_out, [(update, 0.15)]) for update in updates)
    outcome = try_updates(updates, weights, held_out, RahSettings(delta=delta))
    kept = len(outcome.accepted)
    assert 1 <= kept < 4
    assert [update for update, _ in outcome.accepted] == updates[:kept]
    assert all(trial.state == "rolled back: total too large" for trial in outcome.trials[kept:])
    assert all(trial.alpha == 0 and trial.tried for trial in outcome.trials[kept:])
    assert [step.alpha for step in outcome.totals] == list(range(4, kept - 1, -1))
    assert outcome.kl == measured(weights, held_out, outcome.accepted) <= delta
    assert all(step.kl > delta for step in outcome.totals[:-1])


def test_an_update_for_which_no_step_holds_is_rolled_back(parts: tuple) -> None:
    weights, held_out, updates = parts
    outcome = try_updates(updates[:1], weights, held_out, RahSettings(delta=1e-9, halvings=2))
    assert outcome.trials[0].state == "rolled back: no step holds"
    assert len(outcome.trials[0].tried) == 3
    assert (outcome.accepted, outcome.totals, outcome.kl) == ([], [], 0.0)


def test_an_update_without_edits_is_not_tried(parts: tuple) -> None:
    weights, held_out, updates = parts
    outcome = try_updates([Update((Target(0, 0),), ()), updates[0]], weights, held_out, RahSettings(delta=10))
    assert [trial.state for trial in outcome.trials] == ["equals its anchors", "calibrated"]
    assert [update for update, _ in outcome.accepted] == [updates[0]]


def test_the_weights_are_left_as_they_were(parts: tuple) -> None:
    weights, held_out, updates = parts
    try_updates(updates, weights, held_out, RahSettings(delta=0.01))
    assert held_out.kl() == 0.0
