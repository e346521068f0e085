"""I-SAL and CAF compared with the paper's formulas, and hooks compared with the model's outputs."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.profile import (
    Profile,
    attention_flow,
    counted_logits,
    gate_gradients,
    margin_loss,
    profile_heads,
    read_attention,
)
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.heads.families import decoder_layers, head_layout
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import N_IMAGE, calibration_model, collate, features
from tests.tiny_models import HEADS, IMAGE, LAYERS, VLMS, vlm, vlm_batch

# -- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, image", [([0, 4, 5], [1, 2, 3, 6]), ([3, 4, 5, 6], [0, 1, 2])])
def test_flow_is_the_mean_of_both_directions(text, image):
    scores = torch.randn(5, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    attention = scores.softmax(dim=-1)
    flow, maps = attention_flow(attention, torch.tensor(text), torch.tensor(image), len(image))
    for head in range(5):
        to_image = sum(attention[head, i, j] for i in text for j in image) / (len(text) * len(image))
        to_text = sum(attention[head, i, j] for i in image for j in text) / (len(image) * len(text))
        assert flow[head] == pytest.approx((0.5 * (to_image + to_text)).item(), rel=1e-6)
        assert torch.allclose(maps[head], torch.stack([attention[head, text, j].mean() for j in image]))
        assert (to_text == 0) == (min(text) > max(image))  # image tokens do not see the text after them


@pytest.mark.parametrize("name", [name for name in VLMS if not name.startswith(("qwen3_5", "minicpmv"))])
def test_captured_flow_matches_the_attention_that_the_model_returns_and_leaves_the_model_as_it_was(name):
    model = vlm(name).eval()
    # gpt-oss has attention sinks, which sdpa does not support
    assert (model.config.get_text_config()._attn_implementation == "sdpa") == (name != "llava-gpt_oss")
    batch = vlm_batch(model, rows=3)
    n_image = int((batch["input_ids"][0] == IMAGE).sum())
    modules = [layer.self_attn for layer in decoder_layers(model)]
    before = [module.config._attn_implementation for module in modules]
    found = read_attention(Forward(model), n_image, batch)
    assert [module.config._attn_implementation for module in modules if not module._forward_hooks] == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        returned = model(**batch, output_attentions=True, use_cache=False).attentions
    assert len(found) == 3
    for row, (flow, maps) in enumerate(found):
        image = batch["input_ids"][row] == IMAGE
        text = batch["attention_mask"][row].bool() & ~image
        tokens = text.nonzero().flatten(), image.nonzero().flatten()
        expected = [attention_flow(returned[layer][row], *tokens, n_image) for layer in range(LAYERS)]
        for ours, theirs in zip((flow, maps), zip(*expected, strict=True), strict=True):
            assert torch.allclose(ours, torch.stack(theirs), atol=1e-7)


def test_only_one_layers_attention_is_in_memory_at_a_time():
    model = vlm("llava-llama", num_hidden_layers=5).eval()
    alive, counts = weakref.WeakSet(), []

    def count(_: nn.Module, __: Any, output: tuple) -> None:
        alive.add(output[1])
        counts.append(len(alive))

    for layer in decoder_layers(model):
        layer.self_attn.register_forward_hook(count)
    read_attention(Forward(model), 4, vlm_batch(model))
    assert counts == [1] * 5


# -- logits, the margin loss and gates -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_logits_at_counted_tokens_match_those_of_a_full_pass(name):
    model = vlm(name).eval()
    batch = vlm_batch(model, rows=3)
    all_logits = model(**batch).logits
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    last = torch.zeros_like(attended)
    last[range(3), attended.sum(dim=1) - 1] = True
    for positions, expected in {"text": attended & (ids != IMAGE), "all": attended, "last": last}.items():
        logits, counted = counted_logits(Forward(model), batch | {"labels": ids}, positions)
        assert torch.allclose(logits[counted], all_logits[expected], atol=1e-5)
        assert counted.sum() == expected.sum()


def test_the_margin_loss_is_the_log_ratio_of_the_two_largest_probabilities():
    logits = torch.randn(2, 5, 9) * 3
    positions = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    for row, loss in enumerate(margin_loss(logits.masked_fill(~positions[..., None], torch.nan), positions)):
        probabilities = logits[row, positions[row]].softmax(dim=1).sort(dim=1, descending=True).values
        expected = -(probabilities[:, 0] / probabilities[:, 1]).log().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return margin_loss(*counted_logits(Forward(model), batch, "text"))


def loss_with(model: nn.Module, batch: dict[str, Any], layer: int, head: int, gate: float) -> torch.Tensor:
    """Returns the loss of a copy of the model in which the gate multiplies one head's output columns."""
    changed = copy.deepcopy(model)
    width = head_layout(changed.config).head_dim
    with torch.no_grad():
        decoder_layers(changed)[layer].self_attn.o_proj.weight[:, head * width : (head + 1) * width] *= gate
        return loss_of(changed, batch)


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen3", "gemma3"])
def test_gate_gradients_match_finite_differences_of_each_samples_loss(name):
    model = vlm(name).eval().double()
    batch = vlm_batch(model, rows=3)
    batch["pixel_values"] = batch["pixel_values"].double()
    gradients = gate_gradients(Forward(model), "text", batch)
    assert gradients.shape == (3, LAYERS, HEADS)
    step = 1e-3  # the loss is computed from logits in single precision
    for layer, head in ((0, 0), (0, HEADS - 1), (LAYERS - 1, 1)):
        up, down = (loss_with(model, batch, layer, head, 1 + sign * step) for sign in (1, -1))
        assert torch.allclose(gradients[:, layer, head], (up - down) / (2 * step), rtol=1e-2, atol=1e-3)
    assert gradients.abs().max() > 0.01


@pytest.mark.parametrize("name", ["llava-llama", "llava-gpt_oss", "gemma3", "qwen2_5_vl"])
def test_gates_of_one_change_nothing(name):
    model = vlm(name).eval().bfloat16().requires_grad_(False)
    batch = vlm_batch(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: logits.append(output.logits))
    loss_of(model, batch)
    assert gate_gradients(Forward(model), "text", batch).abs().sum() > 0
    assert torch.equal(*logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- all samples -----------------------------------------------------------------------------------------------------


def test_saliency_is_the_standard_score_within_each_layer():
    flow = torch.rand(3, 8).double() * 1e-3  # attention weights over hundreds of tokens are small
    flow[2] = 0.25  # equal heads
    saliency = Profile(flow, flow, flow).saliency
    for layer in range(2):
        expected = (flow[layer] - flow[layer].mean()) / flow[layer].std(correction=0)
        assert torch.allclose(saliency[layer], expected, rtol=1e-6)
    assert torch.equal(saliency[2], torch.zeros(8, dtype=torch.double))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_caf_is_the_signed_mean_gradient_and_its_weighted_mean_square(weight):
    gradients = torch.randn(6, 2, 3)
    caf = Profile(gradients, gradients, gradients).influence(weight)
    expected = sum(gradient + weight * gradient**2 for gradient in gradients.double()) / 6
    assert torch.allclose(caf, expected, rtol=1e-5)


def test_a_profile_is_the_mean_over_samples_for_any_batches():
    samples, forward = features(7), Forward(calibration_model())
    profile = profile_heads(forward, samples, collate, RahConfig(probes=3, batch_size=4))
    batches = [collate([sample]) for sample in samples]
    flows, maps = zip(*(read_attention(forward, N_IMAGE, batch)[0] for batch in batches), strict=True)
    gradients = [gate_gradients(forward, "text", batch)[0] for batch in batches]
    assert profile.flow.shape == profile.gradients.shape[1:] == (4, 8)
    assert torch.allclose(profile.flow, torch.stack(flows).double().mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.maps, torch.stack(maps).mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.gradients, torch.stack(gradients[:3]), atol=1e-5)


def test_a_broken_checkpoint_is_refused():
    model = calibration_model()
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="model: it computes NaN or infinity"):
        profile_heads(Forward(model), features(3), collate, RahConfig(probes=2, batch_size=2))
