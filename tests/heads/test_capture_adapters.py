"""Heads whose output projection has an adapter or 4-bit weights."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.head_reference import check_heads
from tests.tiny_models import text_batch, text_model
from torch import Tensor, nn

from llamafactory_hera.heads.capture import HeadCapture
from llamafactory_hera.heads.families import decoder_layers


def adapt(model: nn.Module, **config) -> nn.Module:
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if "lora_magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    return wrapped


def merged_projections(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """Returns the weight and bias of each output projection after PEFT has merged its adapter."""
    found = []
    for layer in decoder_layers(model):
        merged = copy.deepcopy(layer.self_attn.o_proj)
        base = merged.get_base_layer()
        plain = base.weight.clone()
        if any(merged.lora_bias.values()) and base.bias is None:  # PEFT merges a bias only if the base layer has one
            base.bias = nn.Parameter(torch.zeros(base.out_features))
        merged.merge()
        assert (base.weight - plain).abs().max() > 0.05
        found.append((base.weight.detach(), base.bias))
    return found


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"lora_bias": True}],
    ids=["LoRA", "DoRA", "rsLoRA", "LoRA with a bias"],
)
def test_heads_under_an_adapter_use_the_merged_projection(config, bias):
    model = adapt(text_model("llama", attention_bias=bias), lora_dropout=0.0, **config)
    batch = text_batch()
    check_heads(model, batch, batch["attention_mask"], merged_projections(model))


def test_only_the_active_adapter_counts():
    model = adapt(text_model("llama"))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    batch = text_batch()
    for name in ("default", "other"):
        model.set_adapter(name)
        check_heads(model, batch, batch["attention_mask"], merged_projections(model))
    with model.disable_adapter():
        check_heads(model, batch, batch["attention_mask"])


def captured(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with HeadCapture(model, "L0H1,L1H2") as capture:
        capture.pool(batch["attention_mask"])
        model(**batch)
        return capture.representations()


def test_gradients_of_an_adapter_are_those_of_the_merged_projection():
    """Compares with autograd's gradient of ``(W + s B A)[:, head] @ pooled``."""
    model = adapt(text_model("llama", attention_bias=True))
    batch = text_batch()
    projection = decoder_layers(model)[1].self_attn.o_proj
    entered = []
    handle = projection.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    z = captured(model, batch)[1]
    handle.remove()
    a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
    weight = projection.get_base_layer().weight + projection.scaling["default"] * b @ a
    mask = batch["attention_mask"].float()
    pooled = torch.einsum("bt,btx->bx", mask / mask.sum(1, keepdim=True), entered[0])
    expected = pooled[:, 32:48] @ weight[:, 32:48].T
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
    query = decoder_layers(model)[0].self_attn.q_proj.lora_B["default"].weight
    got = torch.autograd.grad(z.square().sum(), (a, b, query), retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), (a, b, query))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted)


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def quantized(request, tmp_path: Path) -> nn.Module:
    """Loads a model in 4-bit NF4, as QLoRA does."""
    pytest.importorskip("bitsandbytes")
    model = text_model("qwen3", attention_bias=request.param, hidden_size=64)
    model.save_pretrained(tmp_path)
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    return loaded.train()


def dequantized(projection: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    assert projection.weight.dtype == torch.uint8
    return dequantize_4bit(projection.weight.data, projection.weight.quant_state)


def test_heads_of_4_bit_weights_use_the_dequantized_projection(quantized):
    batch = text_batch()
    modules = [layer.self_attn.o_proj for layer in decoder_layers(quantized)]
    check_heads(quantized, batch, batch["attention_mask"], [(dequantized(each), each.bias) for each in modules])
    model, reference = adapt(quantized), []
    for module in (layer.self_attn.o_proj for layer in decoder_layers(model)):
        base = module.get_base_layer()
        reference.append((dequantized(base) + module.get_delta_weight("default"), base.bias))
    check_heads(model, batch, batch["attention_mask"], reference)
    captured(model, batch).square().sum().backward()
    assert decoder_layers(model)[1].self_attn.o_proj.lora_A["default"].weight.grad.abs().max() > 1e-3
