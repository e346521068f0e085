"""Where the heads are in a model, and which parameters feed one, held against the gradients that arrive."""

from itertools import product

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.head_reference import check_pooled
from tests.tiny_models import DECODER, LAYERS, VLMS, text_batch, text_model, vlm, vlm_batch
from torch import nn

from llamafactory_hera.heads import HeadCapture, LayerCapture, families
from llamafactory_hera.heads.families import (
    FAMILIES,
    HeadLayout,
    decoder_layers,
    head_layout,
    model_config,
    trainable_upstream,
)


@pytest.mark.parametrize(
    "config, expected",
    [
        # Qwen3-4B: head_dim is its own value, not 2560 / 32
        (
            tf.Qwen3Config(
                hidden_size=2560,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                num_hidden_layers=36,
            ),
            HeadLayout("qwen3", 36, 32, 8, 128, 2560),
        ),
        # a configuration without head_dim
        (
            tf.Qwen2Config(hidden_size=2048, num_attention_heads=16, num_key_value_heads=2, num_hidden_layers=36),
            HeadLayout("qwen2", 36, 16, 2, 128, 2048),
        ),
        # Vicuna-7B: no grouped-query attention
        (
            tf.LlamaConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32),
            HeadLayout("llama", 32, 32, 32, 128, 4096),
        ),
    ],
    ids=["Qwen3-4B", "Qwen2.5-3B", "Vicuna-7B"],
)
def test_the_layout_is_read_from_a_configuration_alone(config, expected):
    assert head_layout(config) == expected
    assert head_layout(tf.LlavaConfig(text_config=config, vision_config=tf.CLIPVisionConfig())) == expected


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    for call in (head_layout, lambda config: HeadCapture(gpt2(), "L0H0")):
        with pytest.raises(ValueError, match="model: the text model type 'gpt2' is not supported") as error:
            call(gpt2().config)
        assert all(known in str(error.value) for known in FAMILIES)
        assert "add it to FAMILIES" in str(error.value)


_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
_MIXED = ["full_attention", "linear_attention"]
_STREAMS = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "keys", "why"),
    [
        (
            tf.DeepseekV3ForCausalLM,
            _LATENT,
            "4 heads of 8 .* of 32 inputs.*'deepseek_v3' model has one that takes 48",
        ),
        (tf.MllamaForCausalLM, {"cross_attention_layers": [1]}, "layer 1 of this 'mllama_text_model' model has none"),
        (tf.Qwen3_5ForCausalLM, {"layer_types": _MIXED}, "layer 1 of this 'qwen3_5_text' model has none"),
        (tf.PhiForCausalLM, {}, "layer 0 of this 'phi' model has none"),
        (tf.Gemma3nForCausalLM, _STREAMS, r"a layer returns \[4, 3, 10, 48\] for 3 rows of 10 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused_and_in_the_table_too(kind, keys, why, monkeypatch):
    config = kind.config_class(**DECODER | keys)
    with pytest.raises(ValueError, match=f"the text model type '{config.model_type}' is not supported"):
        head_layout(config)
    monkeypatch.setattr(families, "FAMILIES", {config.model_type})
    batch = text_batch()
    with pytest.raises(ValueError, match=f"model: .*{why}.*[Uu]se another model"):
        check_pooled(kind(config), batch, batch["attention_mask"].bool())


def test_a_module_without_a_configuration_is_refused():
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        HeadCapture(nn.Linear(2, 2), "L0H0")


def test_a_model_with_two_decoders_is_refused():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = text_model("qwen3"), text_model("qwen3")

    with pytest.raises(ValueError, match=r"one text decoder of type 'qwen3' .* holds first\.model, second\.model"):
        decoder_layers(Pair())


class Wrapper(nn.Module):
    """As a sharding engine: holds the model as a child and answers for its attributes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


def wrap_decoder(model: nn.Module) -> nn.Module:
    model.model.language_model = Wrapper(model.model.language_model)
    return Wrapper(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
        Wrapper,
        wrap_decoder,
        torch.nn.DataParallel,
    ],
    ids=["PEFT", "wrapper", "wrapped inside", "DataParallel"],
)
def test_the_decoder_is_found_inside_wrappers(wrap):
    model = vlm("llava-qwen3")
    expected = list(model.model.language_model.layers)
    wrapped = wrap(model)
    assert [id(layer) for layer in decoder_layers(wrapped)] == [id(layer) for layer in expected]
    assert len(expected) == LAYERS
    assert model_config(wrapped) is model.config


# -- which parameters feed a head ------------------------------------------------------------------------------------


def reached(model: nn.Module, batch: dict[str, torch.Tensor], layer: int, whole_layer: bool = False) -> set[str]:
    """Parameters that get a gradient from a head of the layer, or from its output."""
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


#: Get no gradient: that of the keys cancels out in the softmax, that of the projection belongs to no head.
BIASES = ("k_proj.bias", "o_proj.bias")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_upstream_of_a_bare_decoder(model_type):
    model = text_model(model_type)
    for layer, whole_layer in product((0, 1), (False, True)):
        found = set(trainable_upstream(model, layer, whole_layer))
        arrived = reached(model, text_batch(), layer, whole_layer)
        behind = (".mlp.", ".feed_forward.")
        assert any(f"layers.{layer}{part}" in name for name in found for part in behind) == whole_layer
        assert arrived <= found
        assert not {name for name in found - arrived if not name.endswith(BIASES)}


@pytest.mark.parametrize("name", VLMS)
def test_upstream_inside_a_vlm(name):
    model = vlm(name)
    for layer in (0, 1):
        found = set(trainable_upstream(model, layer))
        arrived = reached(model, vlm_batch(model), layer)
        assert arrived <= found
        # of the vision side, not everything is used by every model (a class token, layers behind the chosen one)
        unused = {n for n in found - arrived if "vision" not in n and "visual" not in n and not n.endswith(BIASES)}
        assert not unused
        assert any("vision" in n or "visual" in n for n in arrived)


def train(model: nn.Module, *parts: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def lora(model: nn.Module, targets: list[str] | str, **config) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config))


_PROJECTOR = "multi_modal_projector"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: train(text_model("qwen3")), [(0, ""), (0, "")]),
        (
            lambda: train(text_model("qwen3"), "layers.1.mlp", "post_attention", "lm_head", "model.norm"),
            [(0, ""), (1, "layers.0.post_attention")],
        ),
        (lambda: train(vlm("llava-qwen3"), _PROJECTOR), [(4, _PROJECTOR)] * 2),
        (lambda: train(text_model("qwen3", tie_word_embeddings=True), "embed_tokens"), [(1, "embed_tokens")] * 2),
        (
            lambda: train(text_model("qwen3", tie_word_embeddings=False), "embed_tokens", "lm_head"),
            [(1, "embed_tokens")] * 2,
        ),
        (lambda: lora(text_model("qwen3"), ["q_proj"]), [(2, "layers.0"), (4, "q_proj")]),
        (lambda: lora(text_model("qwen3"), ["v_proj", "o_proj"]), [(4, "layers.0"), (8, "layers.")]),
        (lambda: lora(text_model("qwen3"), ["down_proj"]), [(0, ""), (2, "layers.0")]),
        (lambda: lora(text_model("qwen3"), "all-linear"), [(8, "layers.0"), (22, "layers.")]),
        (lambda: lora(text_model("qwen3"), r".*layers\.1\.mlp\.(up|down|gate)_proj"), [(0, ""), (0, "")]),
        (
            lambda: lora(vlm("llava-qwen3"), r".*language_model.*down_proj", modules_to_save=[_PROJECTOR]),
            [(4, f"{_PROJECTOR}.modules_to_save"), (6, "")],
        ),
    ],
    ids=["nothing", "behind", "projector", "tied", "untied", "q", "v, o", "down", "all", "last MLP", "with projector"],
)
def test_upstream_of_what_is_trained(make, expected):
    for layer, (n, part) in enumerate(expected):
        model = make()
        found = trainable_upstream(model, layer)
        assert len(found) == n
        assert all(part in name for name in found)
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        batch = vlm_batch(bare) if hasattr(bare.config, "vision_config") else text_batch()
        assert set(found) == reached(model, batch, layer)
