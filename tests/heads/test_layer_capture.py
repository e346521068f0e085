"""Layer outputs against the model's own hidden states, without and with gradient checkpointing."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.head_reference import mean_over
from tests.tiny_models import LAYERS, VLMS, answer_labels, text_batch, text_model, vlm, vlm_batch
from torch import Tensor, nn

from llamafactory_hera.heads import LayerCapture
from llamafactory_hera.heads.families import FAMILIES, decoder_layers

CHECKPOINTING = {"none": None, "reentrant": True, "non-reentrant": False}


def enable(model: nn.Module, checkpointing: str) -> None:
    reentrant = CHECKPOINTING[checkpointing]
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(layer.gradient_checkpointing for layer in decoder_layers(model))


def layer_outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of every layer, read by the test's own hooks."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach())

    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return outputs


def inputs(model: nn.Module, rows: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    batch = vlm_batch(model, rows=rows)
    batch["labels"] = answer_labels(batch)
    return batch, batch["labels"] != -100


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_it_is_the_hidden_state_of_the_model(model_type: str) -> None:
    model, batch = text_model(model_type), text_batch()
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    with LayerCapture(model, "L0") as capture:
        capture.pool(mask)
        hidden = model(**batch, output_hidden_states=True).hidden_states
        torch.testing.assert_close(capture.representations()[0], mean_over(hidden[1], mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", VLMS)
def test_every_vlm(name: str, checkpointing: str) -> None:
    model = vlm(name)
    batch, mask = inputs(model)
    expected = torch.stack([mean_over(hidden, mask) for hidden in layer_outputs(model, batch)])
    enable(model, checkpointing)
    with LayerCapture(model, [1, 0]) as capture:
        capture.pool(mask)
        model(**batch)
        z = capture.representations()
    assert z.requires_grad
    torch.testing.assert_close(z.detach(), expected.flip(0), rtol=0, atol=1e-5 * expected.abs().max().item())


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    )


def from_hooks(model: nn.Module, batch: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """LM loss and averages of both layers' outputs, read by hooks of the test: right without checkpointing."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder_layers(model)
    ]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    return loss, torch.stack([mean_over(hidden, mask) for hidden in outputs])


def captured(model: nn.Module, batch: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the capture, which is removed before the backward pass."""
    with LayerCapture(model, "L0,L1") as capture:
        capture.pool(mask)
        return model(**batch).loss, capture.representations()


def gradients(model: nn.Module, loss: Tensor, z: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (loss + (z * torch.linspace(-1, 1, z.shape[-1])).square().sum()).backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("lm", [1.0, 0.0], ids=["both losses", "the term alone"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llava-qwen3", "qwen2_vl", "qwen3_vl"])
def test_gradients_are_those_of_the_hidden_states(name: str, wrap: Any, checkpointing: str, lm: float) -> None:
    torch.manual_seed(3)
    model = wrap(vlm(name))
    batch, mask = inputs(model.get_base_model() if hasattr(model, "get_base_model") else model)
    loss, z = from_hooks(model, batch, mask)
    expected = gradients(model, lm * loss, z)
    enable(model, checkpointing)
    loss, z = captured(model, batch, mask)
    found = gradients(model, lm * loss, z)
    assert any("down_proj" in name and gradient.any() for name, gradient in expected.items())
    for name_, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name_], gradient, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_chosen_tokens_of_each_row(checkpointing: str) -> None:
    model = vlm("llava-qwen3")
    batch, _ = inputs(model)
    outputs = layer_outputs(model, batch)
    enable(model, checkpointing)
    positions = torch.tensor([[1, 2, 3], [4, 4, 0], [2, 1, 0], [0, 5, 1]])
    with LayerCapture(model, "L1,L0") as capture:
        capture.tokens(positions)
        model(**batch)
        z = capture.representations()
    assert z.shape == (2, 4, 3, 48)
    for site, layer in enumerate((1, 0)):
        for row in range(4):
            torch.testing.assert_close(
                z[site, row].detach(),
                outputs[layer][row, positions[row]],
                rtol=0,
                atol=1e-5 * outputs[layer].abs().max(),
            )


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_it_says_which_layers_got_a_gradient(checkpointing: str) -> None:
    model = vlm("llava-qwen3")
    enable(model, checkpointing)
    batch, mask = inputs(model)
    with LayerCapture(model, "L0,L1") as capture:
        capture.watch_gradients = True
        for factors, expected in (((1.0, 1.0), {0, 1}), ((0.0, 1.0), {1}), ((0.0, 0.0), set())):
            capture.pool(mask)
            model(**batch)
            (capture.representations() * torch.tensor(factors).view(2, 1, 1)).sum().backward()
            assert capture.gradient_seen == expected


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_nothing_is_left_behind(checkpointing: str) -> None:
    model = vlm("llava-qwen3")
    enable(model, checkpointing)
    layers = decoder_layers(model)
    before = [(dict(vars(layer)), dict(layer._forward_hooks)) for layer in layers]
    capture = LayerCapture(model, "L0,L1")
    batch, mask = inputs(model)
    with capture:
        capture.pool(None)
        model(**batch)
        with pytest.raises(RuntimeError, match=r"No forward pass through layers \[0, 1\] was captured"):
            capture.representations()
        capture.pool(mask)
        model(**batch)
        capture.representations()
    assert [(dict(vars(layer)), dict(layer._forward_hooks)) for layer in layers] == before
    with pytest.raises(RuntimeError, match="No forward pass"):
        capture.representations()


def test_checkpointing_that_is_switched_on_after_the_hooks() -> None:
    model = vlm("llava-qwen3")
    batch, mask = inputs(model)
    expected = torch.stack([mean_over(hidden, mask) for hidden in layer_outputs(model, batch)])
    with LayerCapture(model, "L0,L1") as capture:
        enable(model, "reentrant")
        for _ in range(2):
            capture.pool(mask)
            model(**batch)
            z = capture.representations()
            assert z.requires_grad
            z.sum().backward()  # recomputation must not be captured in the place of the pass
            torch.testing.assert_close(capture.representations().detach(), expected, rtol=0, atol=1e-5)


def test_a_layer_outside_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=f"hera_layers: L7 does not exist: this model has layers L0 to L{LAYERS - 1}"):
        LayerCapture(text_model("qwen3"), "L1,L7")
