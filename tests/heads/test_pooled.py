"""One pass reads every head and layer: averages of the tokens themselves, which sum up to the attention output."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny_models import HEADS, LAYERS, VLMS, answer_labels, text_batch, text_model, vlm, vlm_batch

from llamafactory_hera.heads.families import FAMILIES, decoder_layers, head_layout, model_config, output_projection
from llamafactory_hera.heads.pooled import PooledHeads, mean_over_tokens, projection_weights, text_decoder


def run_and_keep_tokens(model, batch, mask):
    """What the capture says, beside all tokens of every output projection and layer, kept by hooks of the test."""
    projected, hidden, handles = {}, {}, []
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        projection = output_projection(layer, head_layout(model_config(model)).model_type)
        handles.append(projection.register_forward_hook(lambda _, __, out, i=index: projected.__setitem__(i, out)))
        handles.append(
            layer.register_forward_hook(
                lambda _, __, out, i=index: hidden.__setitem__(i, out[0] if isinstance(out, tuple) else out)
            )
        )
    with PooledHeads(model) as pooled, torch.no_grad():
        pooled.pool(mask)
        model(**batch)
        heads, outputs = pooled.take()
    for handle in handles:
        handle.remove()
    return heads, outputs, projected, hidden


def naive_mean(hidden, mask):
    rows = [tokens[kept].double().mean(0) for tokens, kept in zip(hidden, mask, strict=True)]
    return torch.stack(rows)


def check(model, batch, mask):
    model.eval()
    heads, outputs, projected, hidden = run_and_keep_tokens(model, batch, mask)
    layout = head_layout(model_config(model))
    rows = batch["input_ids"].shape[0]
    assert heads.shape == (rows, LAYERS, HEADS, layout.head_dim)
    assert outputs.shape == (rows, LAYERS, layout.hidden_size)
    for index, weight in enumerate(projection_weights(model)):
        # the heads' contributions sum up to the attention output
        contributions = heads[:, index].flatten(1).double() @ weight().double().T
        torch.testing.assert_close(contributions, naive_mean(projected[index], mask), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(outputs[:, index].double(), naive_mean(hidden[index], mask), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_text_family(model_type):
    batch = text_batch()
    mask = batch["attention_mask"].bool()
    mask[:, :3] = False
    check(text_model(model_type), batch, mask)


@pytest.mark.parametrize("name", VLMS)
def test_every_vlm_with_its_image(name):
    model = vlm(name)
    batch = vlm_batch(model)
    check(model, batch, answer_labels(batch) != -100)


@pytest.mark.parametrize("name", VLMS)
def test_the_text_decoder_of_a_vlm_runs_on_token_ids_alone(name):
    model = vlm(name).eval()
    decoder = text_decoder(model)
    batch = text_batch()
    with PooledHeads(model) as pooled, torch.no_grad():
        pooled.pool(batch["attention_mask"].bool())
        output = decoder(**batch, use_cache=False)
        heads, _ = pooled.take()
    assert not hasattr(output, "logits")
    assert heads.isfinite().all()


def test_each_head_has_its_own_slice():
    model = text_model("qwen3").eval()
    batch = text_batch()
    mask = batch["attention_mask"].bool()
    with PooledHeads(model) as pooled, torch.no_grad():
        pooled.pool(mask)
        model(**batch)
        before, _ = pooled.take()
        before = before.clone()
        # of a grouped-query model, heads 2 and 3 read the second value head
        layer = decoder_layers(model)[1]
        layer.self_attn.v_proj.weight[16:] = 0
        pooled.pool(mask)
        model(**batch)
        after, _ = pooled.take()
    assert torch.equal(after[:, 1, :2], before[:, 1, :2])
    assert not after[:, 1, 2:].any()
    assert before[:, 1, 2:].abs().max() > 0.01


def test_tokens_outside_of_the_mask_have_no_influence_even_as_nan():
    hidden = torch.randn(2, 5, 3)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    expected = naive_mean(hidden, mask)
    hidden[~mask] = torch.nan
    torch.testing.assert_close(mean_over_tokens(hidden, mask).double(), expected)


def test_a_row_without_tokens_is_zero():
    assert not mean_over_tokens(torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool)).any()


def test_half_precision_is_averaged_in_fp32():
    hidden = (1 + torch.rand(2, 500, 8)).bfloat16()
    mask = torch.ones(2, 500, dtype=torch.bool)
    torch.testing.assert_close(mean_over_tokens(hidden, mask).double(), naive_mean(hidden, mask), rtol=1e-6, atol=0)


def test_no_tokens_are_kept():
    model = text_model("llama").eval()
    batch = text_batch(rows=2, length=64)
    with PooledHeads(model) as pooled, torch.no_grad():
        pooled.pool(batch["attention_mask"].bool())
        model(**batch)
        held = [*pooled._heads.values(), *pooled._outputs.values()]
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        assert tensor.shape[0] == 2
        assert tensor.dim() == 2


def test_hooks_are_gone_afterwards():
    model = text_model("llama").eval()
    with PooledHeads(model):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_taking_without_a_pass_names_the_layers():
    with PooledHeads(text_model("llama")) as pooled:
        pooled.pool(torch.ones(1, 1, dtype=torch.bool))
        with pytest.raises(RuntimeError, match=r"layers \[0, 1\]"):
            pooled.take()


@pytest.mark.parametrize("dora", [False, True])
def test_the_weight_of_an_adapter_is_the_merged_one(dora):
    model = text_model("qwen3", attention_bias=True)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["o_proj"], lora_dropout=0.5, use_dora=dora)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    seen = [weight() for weight in projection_weights(adapted)]
    merged = adapted.merge_and_unload()
    for weight, layer in zip(seen, decoder_layers(merged), strict=True):
        torch.testing.assert_close(weight, layer.self_attn.o_proj.weight.data, atol=1e-5, rtol=1e-4)


def test_the_weight_of_a_plain_layer_is_exact():
    model = text_model("llama")
    for weight, layer in zip(projection_weights(model), decoder_layers(model), strict=True):
        assert torch.equal(weight(), layer.self_attn.o_proj.weight)


def test_the_weight_of_a_4_bit_layer_is_what_it_dequantises_to():
    bnb = pytest.importorskip("bitsandbytes")
    model = text_model("llama").eval()
    layer = decoder_layers(model)[0]
    weight = layer.self_attn.o_proj.weight.data.clone()
    packed = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer.self_attn.o_proj = packed.to("cpu")
    unpacked = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    torch.testing.assert_close(projection_weights(model)[0](), unpacked.view_as(weight), atol=1e-6, rtol=1e-5)
