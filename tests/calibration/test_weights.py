"""Weights of single heads, with and without grouped queries: reading, editing in place, and saving an adapter."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from llamafactory_hera.calibration.plan import make_plan
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import Edit, HeadWeights, Scaled, Update, applied, save_adapter
from llamafactory_hera.heads import Target
from llamafactory_hera.heads.families import decoder_layers
from tests.calibration.tiny import calibration_model, collate, features, random_profile
from tests.tiny_models import VLMS, same, snapshot, vlm, vlm_batch

#: Models whose layers differ in their heads; UNFIT adds models with fused or latent value projections.
MIXED = {"qwen3_5", "qwen3_5_moe", "gemma4", "minicpmv4_6"}
UNFIT = MIXED | {"llava-phi3", "llava-mistral4", "llava-deepseek_v3", "kimi_k25"}


@pytest.mark.parametrize("name", [name for name in VLMS if name not in UNFIT])
def test_the_slices_of_a_head_make_its_output(name):
    """A head that sees a single token outputs the value of this token: the value block times the token's input."""
    model = vlm(name).eval()
    weights = HeadWeights(model)
    layout, layer = weights.layout, 1
    attention = decoder_layers(model)[layer].self_attn
    seen: dict[str, torch.Tensor] = {}
    value, output = weights.projections[layer, "value"], weights.projections[layer, "output"]
    value.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    output.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0]))
    output.register_forward_hook(lambda _, __, rows: seen.update(out=rows))
    with torch.no_grad():
        if hasattr(attention, "sinks"):  # the sinks of gpt-oss absorb a part of the attention
            attention.sinks.fill_(-1e4)
        for projection in (value, output):
            if projection.bias is not None:
                projection.bias.zero_()
        batch = vlm_batch(model)
        batch["attention_mask"][:, 1:] = 0  # every token sees only the first one
        batch.pop("token_type_ids", None)
        model.config.get_text_config()._attn_implementation = "eager"
        attention.config._attn_implementation = "eager"
        model(**batch)
    x, heads, out = (seen[name][0, 0] for name in ("x", "heads", "out"))
    targets = [Target(layer, index) for index in range(layout.n_heads)]
    values = [weights.of_head(head, "value") @ x for head in targets]
    assert torch.allclose(heads, torch.cat(values), atol=1e-4)
    outputs = [weights.of_head(head, "output") @ value for head, value in zip(targets, values, strict=True)]
    assert torch.allclose(out, sum(outputs), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_named_slices_change_and_are_restored(dtype):
    model = calibration_model().to(dtype)
    weights = HeadWeights(model)
    hidden, d = weights.layout.hidden_size, weights.head_dim
    output = Edit(Target(1, 3), "output", torch.randn(hidden, 2), torch.randn(2, d))
    value = Edit(Target(0, 2), "value", torch.randn(d, 3), torch.randn(3, hidden))
    steps = [(Update((output.head,), (output,)), 0.1), (Update((value.head,), (value,)), 0.05)]
    before = snapshot(model)
    expected = snapshot(model)
    for edit, alpha, block, key in (
        (output, 0.1, (slice(None), slice(24, 32)), "1.self_attn.o_proj"),
        (value, 0.05, (slice(16, 24), slice(None)), "0.self_attn.v_proj"),
    ):
        name = f"model.language_model.layers.{key}.weight"
        expected[name][block] = (before[name][block].float() + alpha * (edit.left @ edit.right)).to(dtype)
        assert not torch.equal(expected[name], before[name])
    with applied(weights, steps):
        assert same(model.state_dict(), expected)
    with pytest.raises(KeyError), applied(weights, steps):
        raise KeyError
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", sorted(MIXED))
def test_layers_that_differ_in_their_heads_are_refused(name):
    with pytest.raises(ValueError, match=r"have different heads .*; use another model"):
        HeadWeights(vlm(name))


@pytest.mark.parametrize("kind", ["wrapped", "quantized", "fused"])
def test_projections_that_are_not_plain_matrices_are_refused(kind):
    model = vlm("llava-phi3") if kind == "fused" else calibration_model()
    if kind == "wrapped":
        inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], r=2), model.model.language_model)
    if kind == "quantized":
        projection = model.model.language_model.layers[1].self_attn.o_proj
        projection.weight = nn.Parameter(projection.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"model: the \w+ projections .*wrapped or fused; use an unquantized model"):
        HeadWeights(model)


# -- the adapter -----------------------------------------------------------------------------------------------------

CONFIG = RahConfig(p_isal=80, p_caf=10, beta=0.2, k=3, rank=3, layers="0,2")


@pytest.fixture(params=["llava-llama", "llava-qwen2"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, list[Scaled], Path]:
    """A model, updates with their step sizes, and the folder of the adapter that contains them."""
    model = calibration_model(request.param)
    weights = HeadWeights(model)
    plan = make_plan(random_profile(), weights, CONFIG)
    steps = [(update, 0.15 / 2 ** (index % 3)) for index, update in enumerate(plan.updates)]
    save_adapter(tmp_path, weights, steps, "tiny/model")
    return model, steps, tmp_path


def test_the_adapter_equals_direct_edits_of_the_base_model(made):
    model, steps, folder = made
    batch = collate(features(3))
    before = snapshot(model)
    with torch.no_grad():
        base = model(**batch).logits
        with applied(HeadWeights(model), steps):
            direct = model(**batch).logits
            edited = snapshot(model)
        adapted = PeftModel.from_pretrained(model, folder)
        unmerged = adapted(**batch).logits
        merged = adapted.merge_and_unload()
    assert (direct - base).abs().max() > 1e-3
    assert (unmerged - direct).abs().max() <= 1e-6 * direct.abs().max()
    for name, value in merged.state_dict().items():
        assert (value - edited[name]).abs().max() <= 1e-6, name
        same = edited[name] == before[name]
        assert torch.equal(value[same], before[name][same]), name  # all other weights are bit-identical


def test_each_projection_has_the_rank_that_its_heads_need(made):
    model, steps, folder = made
    names = HeadWeights(model).names
    edited = Counter(names[edit.head.layer, edit.kind] for update, _ in steps for edit in update.edits)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["rank_pattern"] == config["alpha_pattern"] == {name: 3 * n for name, n in edited.items()}
    assert config["target_modules"] == sorted(edited)
    assert config["base_model_name_or_path"] == "tiny/model"
    assert tensors.keys() == {f"base_model.model.{name}.lora_{side}.weight" for name in edited for side in "AB"}
