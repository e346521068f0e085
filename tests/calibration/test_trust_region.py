"""KL divergence, step sizes and rollback (eq. 14 and 15), with made-up divergences and on a model."""

import math

import pytest
import torch

from llamafactory_hera.calibration.plan import Divergence, held_out_divergence, try_updates
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import Edit, HeadWeights, Update
from llamafactory_hera.heads import Target
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import calibration_model, collate, features
from tests.tiny_models import IMAGE

# -- made-up divergences ---------------------------------------------------------------------------------------------


def updates(n: int) -> list[Update]:
    return [
        Update((Target(1, i),), (Edit(Target(1, i), "output", torch.randn(48, 2), torch.randn(2, 8)),))
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "kl, tried, alpha",
    [
        (lambda steps: 10 * steps[0][1] ** 2, [0.15, 0.075, 0.0375], 0.0375),
        (lambda steps: 0.05, [0.15], 0.15),  # the largest step is tried first, and the bound itself is allowed
        (lambda steps: 1.0, [0.15, 0.075, 0.0375, 0.01875], 0.0),
    ],
)
def test_a_step_is_halved_until_the_bound_holds(kl, tried, alpha):
    (trial,) = try_updates(updates(1), kl, RahConfig(delta=0.05, halvings=3)).trials
    assert trial.tried == [(step, kl([(trial.update, step)])) for step in tried]
    assert trial.alpha == alpha
    assert trial.state == ("calibrated" if alpha else "rolled back: no step is small enough")


@pytest.mark.parametrize(
    "together, kept", [(lambda n: 0.02 * n, 2), (lambda n: 0.04 if n == 1 else 1.0, 1), (lambda n: 0.04 * n, 1)]
)
def test_the_last_updates_are_rolled_back_until_the_total_holds(together, kept):
    tried = updates(5)
    outcome = try_updates(tried, lambda steps: together(len(steps)), RahConfig(delta=0.05))
    assert outcome.accepted == [(update, 0.15) for update in tried[:kept]]
    assert (outcome.kl_before, outcome.kl) == (together(5), together(kept))
    assert {trial.state for trial in outcome.trials[kept:]} == {"rolled back: total too large"}
    assert all(trial.alpha == 0 and trial.tried for trial in outcome.trials[kept:])


def test_an_update_without_edits_is_not_tried():
    last = updates(1)[0]
    outcome = try_updates([Update((Target(0, 0),), ()), last], lambda _: 0.0, RahConfig())
    assert [trial.state for trial in outcome.trials] == ["equals its anchors", "calibrated"]
    assert outcome.accepted == [(last, 0.15)]


# -- a model ---------------------------------------------------------------------------------------------------------


def held_out(model: torch.nn.Module) -> Divergence:
    return held_out_divergence(Forward(model), HeadWeights(model), features(5), collate, RahConfig(batch_size=4))


def test_divergence_is_the_mean_over_tokens_and_then_over_samples():
    model = calibration_model()
    divergence = held_out(model)
    assert divergence([]) == 0.0
    batches = [collate([sample]) for sample in features(5)]
    with torch.no_grad():
        before = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
        model.model.language_model.layers[1].self_attn.o_proj.weight[:, :8] *= 1.5
        after = [model(**batch).logits[0].log_softmax(-1) for batch in batches]
    means = []
    for batch, log_p, log_q in zip(batches, before, after, strict=True):
        text = batch["input_ids"][0] != IMAGE
        means.append((log_p.exp() * (log_p - log_q)).sum(-1)[text].mean().item())
    assert divergence([]) == pytest.approx(sum(means) / 5, rel=1e-3)


def test_logits_that_are_not_finite_are_refused():
    model = calibration_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model: it computes NaN or infinity; use bf16 or fp32"):
        held_out(model)


def test_a_change_after_which_the_model_computes_nan_is_rolled_back():
    tried = updates(2)
    outcome = try_updates(tried, lambda steps: math.nan if len(steps) == 2 else 0.0, RahConfig())
    assert outcome.accepted == [(tried[0], 0.15)]
    assert not try_updates(tried, lambda steps: math.nan, RahConfig(halvings=1)).accepted
