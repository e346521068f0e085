"""Which parameters feed a head, held against the gradients that arrive."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import VLMS, text_batch, text_model, vlm, vlm_batch
from torch import nn

from llamafactory_hera.heads import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import FAMILIES
from llamafactory_hera.heads.families import trainable_upstream


def reached(model: nn.Module, batch: dict[str, torch.Tensor], layer: int, whole_layer: bool = False) -> set[str]:
    """Parameters that get a gradient from a head of the layer, or from its output."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with LayerCapture(model, [layer]) if whole_layer else HeadCapture(model, f"L{layer}H1") as capture:
        capture.pool(batch["attention_mask"])
        model(**batch)
        z = capture.representations()
    if not z.requires_grad:
        return set()
    direction = torch.linspace(-1, 1, z.numel()).view_as(z)
    gradients = torch.autograd.grad((z * direction).sum(), list(trainable.values()), allow_unused=True)
    # less than 1e-6 is rounding: the bias of the projection, which is added and subtracted again
    return {n for n, g in zip(trainable, gradients, strict=True) if g is not None and g.abs().max() > 1e-6}


@pytest.mark.parametrize("whole_layer", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_of_a_bare_decoder(model_type, layer, whole_layer):
    model = text_model(model_type)
    found = set(trainable_upstream(model, layer, whole_layer))
    arrived = reached(model, text_batch(), layer, whole_layer)
    assert any("mlp" in name and f"layers.{layer}." in name for name in found) == whole_layer
    assert arrived <= found
    # the bias of the keys cancels out in the softmax
    assert not {name for name in found - arrived if "k_proj.bias" not in name}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", VLMS)
def test_inside_a_vlm(name, layer):
    model = vlm(name)
    found = set(trainable_upstream(model, layer))
    arrived = reached(model, vlm_batch(model), layer)
    assert arrived <= found
    # of the vision side, not everything is used by every model (a class token, the layers behind the chosen one)
    unused = {n for n in found - arrived if "vision" not in n and "visual" not in n and "k_proj.bias" not in n}
    assert not unused
    assert any("vision" in n or "visual" in n for n in arrived)


def test_nothing_trainable_is_nothing():
    model = text_model("qwen3").requires_grad_(False)
    assert trainable_upstream(model, 1) == []


def test_parameters_behind_the_head_alone_are_none():
    model = text_model("qwen3", tie_word_embeddings=False).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "post_attention" in name or name.startswith("lm_head"))
    model.model.norm.weight.requires_grad_(True)
    assert trainable_upstream(model, 0) == []
    assert all(name.startswith("model.layers.0.post_attention") for name in trainable_upstream(model, 1))
    assert len(trainable_upstream(model, 1)) == 1


def test_a_projector_alone_feeds_every_layer():
    model = vlm("llava-qwen3").requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 4
    for layer in (0, 1):
        assert set(trainable_upstream(model, layer)) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_in_front_of_every_layer(tied):
    model = text_model("qwen3", tie_word_embeddings=tied).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)
    assert trainable_upstream(model, 0) == ["model.embed_tokens.weight"]
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)


def lora(model: nn.Module, targets: list[str] | str, **config) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config))


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "o_proj"], ["down_proj"], "all-linear"])
@pytest.mark.parametrize("layer", [0, 1])
def test_under_lora(targets, layer):
    model = lora(text_model("qwen3"), targets)
    assert set(trainable_upstream(model, layer)) == reached(model, text_batch(), layer)
    if targets == ["down_proj"] and layer == 0:
        assert trainable_upstream(model, layer) == []


def test_lora_on_the_mlp_of_the_deepest_layer_feeds_no_head():
    model = lora(text_model("qwen3"), r".*layers\.1\.mlp\.(up|down|gate)_proj")
    assert any(p.requires_grad for p in model.parameters())
    assert trainable_upstream(model, 0) == trainable_upstream(model, 1) == []


def test_lora_with_a_trained_projector():
    model = lora(vlm("llava-qwen3"), r".*language_model.*down_proj", modules_to_save=["multi_modal_projector"])
    names = trainable_upstream(model, 0)
    assert len(names) == 4
    assert all("multi_modal_projector.modules_to_save" in name for name in names)
    assert set(trainable_upstream(model, 1)) == reached(model, vlm_batch(model.get_base_model()), 1)
