"""The layout of the heads in a model, and the parameters that influence a head, compared with real gradients."""

from itertools import product

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.head_reference import weighted_sum
from tests.tiny_models import BARE, HEADS, TEXT_CONFIGS, VLMS, text_batch, text_model, vlm, vlm_batch
from torch import nn

from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import LayerHeads, decoder_layers, head_layout, model_config, trainable_upstream

SIZES = {"hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 36}


@pytest.mark.parametrize(
    "config, head_dim",
    [
        (tf.Qwen3Config(**SIZES, num_key_value_heads=8, head_dim=100), 100),
        (tf.Qwen2Config(**SIZES, num_key_value_heads=2), 80),
    ],
)
def test_the_layout_is_read_from_a_configuration_alone(config, head_dim):
    for source in (config, tf.LlavaConfig(text_config=config, vision_config=tf.CLIPVisionConfig())):
        layout = head_layout(source)
        assert (layout.model_type, layout.hidden_size) == (config.model_type, 2560)
        assert layout.layers == (LayerHeads("attention", 32, head_dim, "self_attn.o_proj"),) * 36


def test_layers_may_differ_in_their_heads():
    layers = {name: head_layout(TEXT_CONFIGS[name]()).layers for name in ("qwen3_5_text", "gemma4_text", "lfm2")}
    assert layers["qwen3_5_text"] == (
        LayerHeads("linear_attention", 6, 10, "linear_attn.out_proj"),
        LayerHeads("attention", HEADS, 16, "self_attn.o_proj"),
    )
    assert [heads.head_dim for heads in layers["gemma4_text"]] == [16, 24]
    assert layers["lfm2"] == (LayerHeads(), LayerHeads("attention", HEADS, 12, "self_attn.out_proj"))


@pytest.mark.parametrize(
    "config, why",
    [
        (tf.GPT2Config(n_layer=1), "GPT2Model must contain one text decoder of type 'gpt2'"),
        (tf.MambaConfig(num_hidden_layers=1), "no layer of the text model type 'mamba' has an output projection"),
        (tf.T5Config(), "'t5' is an encoder-decoder"),
    ],
)
def test_a_model_without_readable_heads_is_refused(config, why):
    with pytest.raises(ValueError, match=f"model: .*{why}.*use a"):
        head_layout(config)


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


@pytest.mark.parametrize(
    "wrap",
    [lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])), Wrapper, nn.DataParallel],
    ids=["PEFT", "wrapped twice", "DataParallel"],
)
def test_the_decoder_is_found_inside_wrappers(wrap):
    model = vlm("llava-qwen3")
    expected = list(model.model.language_model.layers)
    if wrap is Wrapper:
        model.model.language_model = Wrapper(model.model.language_model)
    wrapped = wrap(model)
    assert [id(layer) for layer in decoder_layers(wrapped)] == [id(layer) for layer in expected]
    assert model_config(wrapped) is model.config


# -- the parameters that feed a head ---------------------------------------------------------------------------------


def reached(model: nn.Module, batch: dict[str, torch.Tensor], layer: int, whole_layer: bool = False) -> set[str]:
    """Returns the names of parameters with a gradient from a head of the layer, or from the layer's output."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with LayerCapture(model, f"L{layer}") if whole_layer else HeadCapture(model, f"L{layer}H1") as capture:
        capture.pool(batch["attention_mask"])
        model(**batch)
        z = capture.representations()
    if not z.requires_grad:
        return set()
    gradients = torch.autograd.grad(weighted_sum(z), list(trainable.values()), allow_unused=True)
    # A gradient below 1e-6 is rounding: the bias of the projection is added and subtracted again.
    return {n for n, g in zip(trainable, gradients, strict=True) if g is not None and g.abs().max() > 1e-6}


#: Parts that may have no influence: parts of a vision tower (its class token, layers after the chosen one), and the
#: per-layer inputs of Gemma 3n and 4, which the first layer reads after its attention.
UNUSED = ("vision", "visual", "per_layer", "altup.correct", "altup_unembed")
#: Biases without a gradient: the keys' bias cancels out in the softmax, and the projection's belongs to no head.
BIASES = ("k_proj.bias", "o_proj.bias")


@pytest.mark.parametrize("name", [*BARE, *VLMS])
def test_upstream_parameters_are_those_that_receive_a_gradient(name):
    model = text_model(name) if name in BARE else vlm(name)
    batch = text_batch() if name in BARE else vlm_batch(model)
    layers = head_layout(model.config).layers
    for layer, whole_layer in product((0, 1), (False, True)):
        if not (layers[layer].n_heads or whole_layer) or (whole_layer and name == "gemma3n_text"):
            continue
        found = set(trainable_upstream(model, layer, whole_layer))
        arrived = reached(model, batch, layer, whole_layer)
        assert arrived <= found
        unused = {n for n in found - arrived if not n.endswith(BIASES) and not any(part in n for part in UNUSED)}
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
def test_only_trainable_parameters_are_listed(trained):
    for layer in (0, 1):
        model = TRAINED[trained]()
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        batch = vlm_batch(bare) if hasattr(bare.config, "vision_config") else text_batch()
        assert set(trainable_upstream(model, layer)) == reached(model, batch, layer)
