"""Which tokens count, and that their logits are the model's."""

import pytest
import torch

from llamafactory_hera.calibration.forward import Forward
from tests.tiny_models import IMAGE, PAD, VLMS, vlm, vlm_batch


@pytest.mark.parametrize("positions", ["text", "all", "last"])
@pytest.mark.parametrize("name", VLMS)
def test_logits_at_the_tokens_that_count(name: str, positions: str) -> None:
    model = vlm(name).eval()
    batch = vlm_batch(model, rows=3)
    with torch.no_grad():
        logits, counted = Forward(model, positions).logits(batch | {"labels": batch["input_ids"]})
        everything = model(**batch).logits
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    expected = {"text": attended & (ids != IMAGE), "all": attended}.get(positions)
    if expected is None:
        expected = torch.zeros_like(attended)
        expected[range(3), attended.sum(dim=1) - 1] = True
    assert torch.allclose(logits[counted], everything[expected], atol=1e-5)
    assert counted.sum() == expected.sum()


def test_no_more_logits_are_computed_than_count() -> None:
    model = vlm("llava-llama").eval()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    batch = vlm_batch(model)
    Forward(model, "text").logits(batch)
    Forward(model, "last").logits({name: value[:1] for name, value in batch.items()})
    Forward(model).run(batch)
    assert rows == [int((batch["input_ids"][0] != IMAGE).sum()), 1, 1]


def test_padding_is_neither_text_nor_image() -> None:
    model = vlm("llava-llama").eval()
    batch = vlm_batch(model, rows=3)
    text, image = Forward(model).modalities(batch)
    assert torch.equal(image, batch["input_ids"] == IMAGE)
    assert torch.equal(text | image, batch["attention_mask"].bool())
    assert not (text & image).any()
    assert (batch["input_ids"] == PAD).any()


def test_autocast_computes_in_the_runs_type() -> None:
    model = vlm("llava-llama").eval()
    logits, _ = Forward(model, autocast=torch.bfloat16).logits(vlm_batch(model))
    assert logits.dtype == torch.bfloat16
