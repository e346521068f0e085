import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.tiny_models import LAYERS, text_model, vlm
from torch import nn

from llamafactory_hera.heads import HeadCapture
from llamafactory_hera.heads.families import FAMILIES, HeadLayout, decoder_layers, head_layout, model_config


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
        with pytest.raises(ValueError, match="model_name_or_path: the text model type 'gpt2' is not known") as error:
            call(gpt2().config)
        assert all(known in str(error.value) for known in FAMILIES)
        assert "add one line to FAMILIES" in str(error.value)


def test_a_module_without_a_configuration_is_refused():
    with pytest.raises(ValueError, match="Linear holds no transformers model"):
        HeadCapture(nn.Linear(2, 2), "L0H0")


def test_a_model_with_two_decoders_is_refused():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = text_model("qwen3"), text_model("qwen3")

    with pytest.raises(ValueError, match=r"one text decoder of type 'qwen3' .* found first\.model, second\.model"):
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
