"""KL, step size and roll-back (eq. 14 and 15), as arithmetic and on a real model."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.trust_region import HeldOut, divergence, try_updates
from llamafactory_hera.calibration.weights import Edit, HeadWeights, Scaled, Update
from llamafactory_hera.heads import Target
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import Rows, calibration_model, collate, noise_images
from tests.tiny_models import IMAGE


def test_divergence_of_each_distribution() -> None:
    base, changed = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    found = divergence(base, changed)
    for i in range(2):
        for j in range(3):
            p, q = base[i, j].softmax(dim=0).tolist(), changed[i, j].softmax(dim=0).tolist()
            expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            assert found[i, j].item() == pytest.approx(expected, rel=1e-4)
    assert (divergence(base, base) == 0).all()


# -- steps and roll-back as arithmetic -------------------------------------------------------------------------------


def updates(n: int) -> list[Update]:
    return [Update((Target(1, i),), (Edit(1, "output", i, torch.randn(48, 2), torch.randn(2, 8)),)) for i in range(n)]


Kl = Callable[[Sequence[Scaled]], float]


@pytest.mark.parametrize(
    "kl, tried, alpha",
    [
        (lambda steps: 10 * steps[0][1] ** 2, [0.15, 0.075, 0.0375], 0.0375),
        (lambda steps: 0.05, [0.15], 0.15),  # the largest step first, and the bound itself is allowed
        (lambda steps: 1.0, [0.15, 0.075, 0.0375, 0.01875], 0.0),
    ],
)
def test_a_step_is_halved_until_the_bound_holds(kl: Kl, tried: list[float], alpha: float) -> None:
    (trial,) = try_updates(updates(1), kl, RahConfig(delta=0.05, halvings=3)).trials
    assert trial.tried == [(alpha, kl([(trial.update, alpha)])) for alpha in tried]
    assert trial.alpha == alpha
    assert trial.state == ("calibrated" if alpha else "rolled back: no step holds")


@pytest.mark.parametrize("together, kept", [(lambda n: 0.02 * n, 2), (lambda n: 0.04 if n == 1 else 1.0, 1)])
def test_the_last_updates_are_given_up_until_the_total_holds(together: Callable[[int], float], kept: int) -> None:
    tried = updates(5)
    outcome = try_updates(tried, lambda steps: together(len(steps)), RahConfig(delta=0.05))
    assert outcome.totals == [(n, together(n)) for n in range(5, kept - 1, -1)]
    assert outcome.accepted == [(update, 0.15) for update in tried[:kept]]
    assert outcome.kl == together(kept)
    assert {trial.state for trial in outcome.trials[kept:]} == {"rolled back: total too large"}
    assert all(trial.alpha == 0 and trial.tried for trial in outcome.trials[kept:])


def test_an_update_without_edits_is_not_tried() -> None:
    last = updates(1)[0]
    outcome = try_updates([Update((Target(0, 0),), ()), last], lambda _: 0.0, RahConfig())
    assert [trial.state for trial in outcome.trials] == ["equals its anchors", "calibrated"]
    assert outcome.accepted == [(last, 0.15)]
    empty = try_updates([], lambda _: 0.0, RahConfig())
    assert (empty.accepted, empty.totals, empty.kl) == ([], [], 0.0)


# -- on a model ------------------------------------------------------------------------------------------------------


def held_out(model: torch.nn.Module, batch_size: int = 4) -> HeldOut:
    rows = Rows([[image] for image in noise_images(5)])
    features = [rows.encode(row) for row in range(5)]
    return HeldOut(Forward(model), HeadWeights(model), features, collate, RahConfig(batch_size=batch_size))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_divergence_is_the_mean_over_tokens_and_then_samples(batch_size: int) -> None:
    model = calibration_model()
    samples = held_out(model, batch_size)
    assert samples.kl() == 0.0
    rows = Rows([[image] for image in noise_images(5)])
    batches = [collate([rows.encode(row)]) for row in range(5)]
    with torch.no_grad():
        before = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
        model.model.language_model.layers[1].self_attn.o_proj.weight[:, :8] *= 1.5
        after = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
    means = []
    for batch, log_p, log_q in zip(batches, before, after, strict=True):
        text = batch["input_ids"][0] != IMAGE
        means.append((log_p.exp() * (log_p - log_q)).sum(-1)[text].mean().item())
    assert samples.kl() == pytest.approx(sum(means) / 5, rel=1e-3)


def test_logits_that_are_not_finite_are_refused() -> None:
    model = calibration_model()
    samples = held_out(model)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    for attempt in (samples.kl, lambda: held_out(model)):
        with pytest.raises(ValueError, match=r"model_name_or_path.*(nan|inf).*NaN or infinity.*bf16 or fp32"):
            attempt()


def test_steps_and_totals_are_those_that_the_model_shows() -> None:
    samples, tried = held_out(calibration_model()), updates(4)
    full = [samples.kl([(update, 0.15)]) for update in tried]
    delta = sorted(full)[1] * 1.01  # two hold at once, two must be halved
    outcome = try_updates(tried, samples.kl, RahConfig(delta=delta))
    for trial, update, kl in zip(outcome.trials, tried, full, strict=True):
        assert trial.update is update
        assert trial.tried[0] == (0.15, kl)
        assert (len(trial.tried) == 1) == (kl <= delta)
        assert all(kl == samples.kl([(update, alpha)]) for alpha, kl in trial.tried)
        assert [kl <= delta for _, kl in trial.tried] == [False] * (len(trial.tried) - 1) + [True]
    assert 1 <= len(outcome.accepted) < 4
    assert outcome.kl == samples.kl(outcome.accepted) <= delta
    assert all(kl > delta for _, kl in outcome.totals[:-1])
    assert samples.kl() == 0.0  # the weights are as they were
