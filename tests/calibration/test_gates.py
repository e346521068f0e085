"""Gate gradients against finite differences of the loss, and what autograd keeps."""

import copy

import pytest
import torch

from llamafactory_hera.calibration.forward import Forward
from llamafactory_hera.calibration.gates import HeadGates
from llamafactory_hera.calibration.influence import margin_loss
from llamafactory_hera.heads.families import decoder_layers, head_layout, output_projection
from tests.tiny_models import HEADS, LAYERS, VLMS, vlm, vlm_batch


def gate_gradients(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    forward = Forward(model)
    with HeadGates(model) as gates:
        gates.reset(len(batch["input_ids"]))
        return gates.gradients(margin_loss(*forward.logits(batch)))


def loss_with(model: torch.nn.Module, batch: dict, layer: int, head: int, gate: float) -> torch.Tensor:
    """The loss of a copy of the model that has the gate in its weights."""
    changed = copy.deepcopy(model)
    layout = head_layout(changed.config)
    weight = output_projection(decoder_layers(changed)[layer], layout.model_type).weight
    with torch.no_grad():
        weight[:, head * layout.head_dim : (head + 1) * layout.head_dim] *= gate
        return margin_loss(*Forward(changed).logits(batch))


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
    before, _ = Forward(model).logits(batch)
    with HeadGates(model) as gates:
        gates.reset(2)
        gated, _ = Forward(model).logits(batch)
    assert torch.equal(gated, before)


@pytest.mark.parametrize("name", VLMS)
def test_no_weight_gets_a_gradient_or_is_kept_for_one(name: str) -> None:
    model = vlm(name).eval()
    assert all(parameter.requires_grad for parameter in model.parameters())
    weights = {id(parameter) for parameter in model.parameters()}
    forward, batch = Forward(model), vlm_batch(model)
    with HeadGates(model) as gates:
        gates.reset(2)
        losses = margin_loss(*forward.logits(batch))
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
