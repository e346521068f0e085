"""The places of heads in a model, and the parameters that feed a head, compared with the gradients that arrive."""

from itertools import product

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.head_reference import check_pooled
from tests.tiny_models import DECODER, VLMS, text_batch, text_model, vlm, vlm_batch
from torch import nn

from llamafactory_hera.heads import families
from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import (
    FAMILIES,
    HeadLayout,
    decoder_layers,
    head_layout,
    model_config,
    trainable_upstream,
)

SIZES = {"hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 36}


@pytest.mark.parametrize(
    "config, expected",
    [
        (tf.Qwen3Config(**SIZES, num_key_value_heads=8, head_dim=100), HeadLayout("qwen3", 36, 32, 8, 100, 2560)),
        (tf.Qwen2Config(**SIZES, num_key_value_heads=2), HeadLayout("qwen2", 36, 32, 2, 80, 2560)),
        (tf.LlamaConfig(**SIZES), HeadLayout("llama", 36, 32, 32, 80, 2560)),
    ],
)
def test_the_layout_is_read_from_a_configuration_alone(config, expected):
    assert head_layout(config) == expected
    assert head_layout(tf.LlavaConfig(text_config=config, vision_config=tf.CLIPVisionConfig())) == expected


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"model: the text model type 'gpt2' is not .*add the type to FAMILIES"
    ) as error:
        head_layout(tf.GPT2Config())
    assert all(known in str(error.value) for known in FAMILIES)


_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
_MIXED = ["full_attention", "linear_attention"]
_STREAMS = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        (tf.DeepseekV3ForCausalLM, _LATENT, "layer 0 of this 'deepseek_v3' model has no self_attn.o_proj that takes"),
        (tf.MllamaForCausalLM, {"cross_attention_layers": [1]}, "layer 1 of this 'mllama_text_model' model has no"),
        (tf.Qwen3_5ForCausalLM, {"layer_types": _MIXED}, "layer 1 of this 'qwen3_5_text' model has no"),
        (tf.PhiForCausalLM, {}, "layer 0 of this 'phi' model has no"),
        (tf.Gemma3nForCausalLM, _STREAMS, r"does not fit a layer that returns \[4, 3, 10, 48\]"),
    ],
)
def test_layers_of_another_kind_are_refused_if_their_model_type_is_added(kind, keys, why, monkeypatch):
    config = kind.config_class(**DECODER | keys)
    assert config.model_type not in FAMILIES
    monkeypatch.setattr(families, "FAMILIES", {config.model_type})
    batch = text_batch()
    with pytest.raises(ValueError, match=f"{why}.*use a"):
        check_pooled(kind(config), batch, batch["attention_mask"].bool())


def test_a_model_with_two_decoders_or_none_is_refused():
    two = nn.ModuleDict({"first": text_model("qwen3"), "second": text_model("qwen3")})
    with pytest.raises(ValueError, match=r"one text decoder of type 'qwen3' .* contains first\.model, second\.model"):
        decoder_layers(two)
    with pytest.raises(ValueError, match="Linear contains no transformers model"):
        decoder_layers(nn.Linear(2, 2))


class Wrapper(nn.Module):
    """Holds the model as a child and forwards its attributes, as sharding engines do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)


def wrap_decoder(model: nn.Module) -> nn.Module:
    model.model.language_model = Wrapper(model.model.language_model)
    return Wrapper(model)


@pytest.mark.parametrize(
    "wrap",
    [lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])), wrap_decoder, nn.DataParallel],
    ids=["PEFT", "wrapped twice", "DataParallel"],
)
def test_the_decoder_is_found_inside_wrappers(wrap):
    model = vlm("llava-qwen3")
    expected = list(model.model.language_model.layers)
    wrapped = wrap(model)
    assert [id(layer) for layer in decoder_layers(wrapped)] == [id(layer) for layer in expected]
    assert model_config(wrapped) is model.config


# -- the parameters that feed a head ---------------------------------------------------------------------------------


def reached(model: nn.Module, batch: dict[str, torch.Tensor], layer: int, whole_layer: bool = False) -> set[str]:
    """Names the parameters that receive a gradient from a head of the layer, or from its output."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with LayerCapture(model, f"L{layer}") if whole_layer else HeadCapture(model, f"L{layer}H1") as capture:
        capture.pool(batch["attention_mask"])
        model(**batch)
        z = capture.representations()
    if not z.requires_grad:
        return set()
    direction = torch.linspace(-1, 1, z.numel()).view_as(z)
    gradients = torch.autograd.grad((z * direction).sum(), list(trainable.values()), allow_unused=True)
    # less than 1e-6 is rounding: the bias of the projection, which is added and subtracted again
    return {n for n, g in zip(trainable, gradients, strict=True) if g is not None and g.abs().max() > 1e-6}


#: Biases without a gradient: that of the keys cancels out in the softmax, that of the projection belongs to no head.
BIASES = ("k_proj.bias", "o_proj.bias")


@pytest.mark.parametrize("name", [*sorted(FAMILIES), *VLMS])
def test_upstream_of_heads_and_layers(name):
    model = text_model(name) if name in FAMILIES else vlm(name)
    batch = text_batch() if name in FAMILIES else vlm_batch(model)
    for layer, whole_layer in product((0, 1), (False, True)):
        found = set(trainable_upstream(model, layer, whole_layer))
        arrived = reached(model, batch, layer, whole_layer)
        assert arrived <= found
        # not every model uses all of its vision tower (a class token, layers after the chosen one)
        unused = {n for n in found - arrived if "vision" not in n and "visual" not in n and not n.endswith(BIASES)}
        assert not unused


def train(model: nn.Module, *parts: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def lora(model: nn.Module, targets: list[str] | str, **config) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config))


_PROJECTOR = "multi_modal_projector"


TRAINED = {
    "nothing": lambda: train(text_model("qwen3")),
    "after the attention": lambda: train(text_model("qwen3"), "layers.1.mlp", "post_attention", "lm_head"),
    "projector": lambda: train(vlm("llava-qwen3"), _PROJECTOR),
    "tied embeddings": lambda: train(text_model("qwen3", tie_word_embeddings=True), "embed"),
    "embeddings": lambda: train(text_model("qwen3", tie_word_embeddings=False), "embed", "lm_head"),
    "LoRA of v and o": lambda: lora(text_model("qwen3"), ["v_proj", "o_proj"]),
    "LoRA of down": lambda: lora(text_model("qwen3"), ["down_proj"]),
    "LoRA of all": lambda: lora(text_model("qwen3"), "all-linear"),
    "LoRA and projector": lambda: lora(vlm("llava-qwen3"), r".*language.*down_proj", modules_to_save=[_PROJECTOR]),
}


@pytest.mark.parametrize("trained", TRAINED)
def test_trainable_parameters_upstream(trained):
    for layer in (0, 1):
        model = TRAINED[trained]()
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        batch = vlm_batch(bare) if hasattr(bare.config, "vision_config") else text_batch()
        assert set(trainable_upstream(model, layer)) == reached(model, batch, layer)
