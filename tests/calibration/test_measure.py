"""I-SAL and CAF: the paper's formulas written out, and what hooks read against what the model itself returns."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.measure import AttentionFlow, HeadGates, attention_flow, margin_loss, resize_map
from llamafactory_hera.calibration.profile import counted_logits
from llamafactory_hera.heads.families import attention_module, decoder_layers, head_layout, output_projection
from llamafactory_hera.selection.forward import Forward
from tests.tiny_models import HEADS, IMAGE, LAYERS, VLMS, vlm, vlm_batch


@pytest.mark.parametrize("text, image", [([0, 4, 5], [1, 2, 3, 6]), ([3, 4, 5, 6], [0, 1, 2])])
def test_flow_is_the_mean_of_both_directions(text: list[int], image: list[int]) -> None:
    scores = torch.randn(5, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    attention = scores.softmax(dim=-1)
    flow, maps = attention_flow(attention, torch.tensor(text), torch.tensor(image))
    for head in range(5):
        to_image = sum(attention[head, i, j] for i in text for j in image) / (len(text) * len(image))
        to_text = sum(attention[head, i, j] for i in image for j in text) / (len(image) * len(text))
        assert flow[head] == pytest.approx((0.5 * (to_image + to_text)).item(), rel=1e-6)
        expected = [sum(attention[head, i, j] for i in text) / len(text) for j in image]
        assert torch.allclose(maps[head], torch.stack(expected))
        assert (to_text == 0) == (min(text) > max(image))  # image tokens see nothing of the text behind them


def test_half_precision_weights_are_averaged_in_single_precision() -> None:
    attention = (torch.rand(2, 200, 200) * 1e-2).bfloat16()
    tokens = torch.arange(150), torch.arange(150, 200)
    for found, exact in zip(
        attention_flow(attention, *tokens), attention_flow(attention.float(), *tokens), strict=True
    ):
        assert torch.equal(found, exact)


def test_a_map_keeps_its_mass_and_its_length_where_it_fits() -> None:
    maps = torch.rand(3, 10)
    assert torch.equal(resize_map(maps, 10), maps)
    assert torch.allclose(resize_map(maps, 5), maps.unflatten(1, (5, 2)).sum(dim=2))


# -- reading attention -----------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> list[nn.Module]:
    return [attention_module(layer, head_layout(model.config).model_type) for layer in decoder_layers(model)]


def captured(model: nn.Module, batch: dict[str, Any], bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    forward = Forward(model)
    with AttentionFlow(model, bins) as flow, torch.no_grad():
        text = forward.tokens("text", batch)
        flow.expect(text, forward.tokens("mean", batch) & ~text)
        forward.run(batch)
        return flow.take()


@pytest.mark.parametrize("name", VLMS)
def test_captured_flow_is_that_of_the_attention_that_the_model_returns(name: str) -> None:
    model = vlm(name).eval()
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    batch = vlm_batch(model, rows=3)
    n_image = int((batch["input_ids"][0] == IMAGE).sum())
    flow, maps = captured(model, batch, n_image)
    assert flow.shape == (3, LAYERS, HEADS)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        returned = model(**batch, output_attentions=True, use_cache=False).attentions
    for row in range(3):
        image = batch["input_ids"][row] == IMAGE
        text = batch["attention_mask"][row].bool() & ~image
        for layer in range(LAYERS):
            expected = attention_flow(returned[layer][row], text.nonzero().flatten(), image.nonzero().flatten())
            assert torch.allclose(flow[row, layer], expected[0], atol=1e-7)
            assert torch.allclose(maps[row, layer], expected[1], atol=1e-7)


def test_one_layer_of_attention_is_held_at_a_time() -> None:
    model = vlm("llava-llama", num_hidden_layers=5).eval()
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def count(_: nn.Module, __: Any, output: tuple) -> None:
        alive.append(weakref.ref(output[1]))
        counts.append(sum(reference() is not None for reference in alive))

    for attention in attentions(model):
        attention.register_forward_hook(count)
    captured(model, vlm_batch(model), 4)
    assert counts == [1] * 5


def test_reading_attention_leaves_the_model_as_it_was() -> None:
    model = vlm("llava-qwen3").eval()
    batch = vlm_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    with AttentionFlow(model, 4):
        assert model.config.text_config._attn_implementation == "eager"
        assert model.config.vision_config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), AttentionFlow(model, 4):
        raise KeyError
    captured(model, batch, 4)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert not any(attention._forward_hooks for attention in attentions(model))
    assert all(attention.config._attn_implementation == "sdpa" for attention in attentions(model))


def test_flow_does_not_depend_on_the_batch() -> None:
    model = vlm("llava-qwen2").eval()
    batch = vlm_batch(model, rows=3)
    together, _ = captured(model, batch, 4)
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        assert torch.allclose(captured(model, alone, 4)[0][0], together[row], atol=1e-7)


# -- the margin loss and gates ---------------------------------------------------------------------------------------


def test_margin_loss_is_the_log_ratio_of_the_two_largest_probabilities() -> None:
    logits = torch.randn(2, 5, 9) * 3
    positions = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    for row, loss in enumerate(margin_loss(logits.masked_fill(~positions[..., None], torch.nan), positions)):
        ratios = []
        for t in positions[row].nonzero().flatten():
            first, second, *_ = sorted(logits[row, t].softmax(dim=0).tolist(), reverse=True)
            ratios.append(torch.tensor(first / second).log().item())
        assert loss.item() == pytest.approx(-sum(ratios) / len(ratios), rel=1e-5)


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return margin_loss(*counted_logits(Forward(model), batch, "text"))


def gate_gradients(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with HeadGates(model) as gates:
        gates.reset(len(batch["input_ids"]))
        return gates.gradients(loss_of(model, batch))


def loss_with(model: nn.Module, batch: dict[str, Any], layer: int, head: int, gate: float) -> torch.Tensor:
    """The loss of a copy of the model that has the gate in its weights."""
    changed = copy.deepcopy(model)
    layout = head_layout(changed.config)
    weight = output_projection(decoder_layers(changed)[layer], layout.model_type).weight
    with torch.no_grad():
        weight[:, head * layout.head_dim : (head + 1) * layout.head_dim] *= gate
        return loss_of(changed, batch)


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2", "llava-qwen3", "gemma3"])
def test_gradients_are_those_of_each_samples_loss(name: str) -> None:
    model = vlm(name).eval().double()
    batch = vlm_batch(model, rows=3)
    batch["pixel_values"] = batch["pixel_values"].double()
    gradients = gate_gradients(model, batch)
    assert gradients.shape == (3, LAYERS, HEADS)
    step = 1e-3  # the loss is computed from logits in single precision
    for layer, head in ((0, 0), (0, HEADS - 1), (LAYERS - 1, 1)):
        up, down = (loss_with(model, batch, layer, head, 1 + sign * step) for sign in (1, -1))
        assert torch.allclose(gradients[:, layer, head], (up - down) / (2 * step), rtol=1e-2, atol=1e-3)
    assert gradients.abs().max() > 0.01


def test_an_open_gate_changes_nothing() -> None:
    model = vlm("llava-qwen3").eval().bfloat16()
    batch = vlm_batch(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    before = loss_of(model, batch)
    with HeadGates(model) as gates:
        gates.reset(2)
        assert torch.equal(loss_of(model, batch), before)


@pytest.mark.parametrize("name", VLMS)
def test_no_weight_gets_a_gradient_or_is_kept_for_one(name: str) -> None:
    model = vlm(name).eval()
    assert all(parameter.requires_grad for parameter in model.parameters())
    weights = {id(parameter) for parameter in model.parameters()}
    with HeadGates(model) as gates:
        gates.reset(2)
        losses = loss_of(model, vlm_batch(model))
        leaves, seen, queue = set(), set(), [losses.grad_fn]
        while queue:  # every leaf of the graph that autograd would fill
            node = queue.pop()
            if hasattr(node, "variable"):
                leaves.add(id(node.variable))
            queue += [child for child, _ in node.next_functions if child is not None and child not in seen]
            seen |= {child for child, _ in node.next_functions}
        assert not leaves & weights
        assert len(leaves) == LAYERS
        gates.gradients(losses)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_weights_stay_frozen() -> None:
    model = vlm("llava-llama").eval().requires_grad_(False)
    assert gate_gradients(model, vlm_batch(model)).abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
