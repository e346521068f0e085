"""Divergence of a changed model on held-out samples."""

import pytest
import torch

from llamafactory_hera.calibration.forward import Forward
from llamafactory_hera.calibration.held_out import HeldOut
from tests.calibration.tiny import Rows, calibration_model, collate, noise_images
from tests.tiny_models import IMAGE


def held_out(model: torch.nn.Module, batch_size: int) -> HeldOut:
    rows = Rows([[image] for image in noise_images(5)])
    return HeldOut(Forward(model), [rows.encode(row) for row in range(5)], collate, batch_size)


def test_an_unchanged_model_does_not_diverge() -> None:
    assert held_out(calibration_model(), 2).kl() == 0.0


@pytest.mark.parametrize("batch_size", [1, 4])
def test_divergence_is_the_mean_over_tokens_and_then_samples(batch_size: int) -> None:
    model = calibration_model()
    samples = held_out(model, batch_size)
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
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    with pytest.raises(ValueError, match=r"model_name_or_path.*NaN or infinity"):
        held_out(model, 2)
