"""Slices of the weights by head, with and without grouped queries, changed in place and by an adapter."""

import copy
import json
from collections.abc import Callable
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
from llamafactory_hera.heads.families import attention_module, decoder_layers, head_layout
from tests.calibration.tiny import Rows, calibration_model, collate, noise_images, random_profile
from tests.tiny_models import VLMS, vlm, vlm_batch

SLICED = [name for name in VLMS if "phi3" not in name]


@pytest.mark.parametrize("name", SLICED)
def test_a_heads_slices_are_what_its_output_is_made_of(name: str) -> None:
    """With one key in sight, a head hands on that key's value: its output is its value block times the input."""
    model = vlm(name).eval()
    weights = HeadWeights(model)
    layout, layer = weights.layout, 1
    attention = attention_module(decoder_layers(model)[layer])
    seen: dict[str, torch.Tensor] = {}
    attention.v_proj.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0]))
    attention.o_proj.register_forward_hook(lambda _, __, output: seen.update(out=output))
    with torch.no_grad():
        if hasattr(attention, "sinks"):  # where a part of the attention goes to no key
            attention.sinks.fill_(-1e4)
        if attention.v_proj.bias is not None:
            attention.v_proj.bias.zero_()
        if attention.o_proj.bias is not None:
            attention.o_proj.bias.zero_()
        batch = vlm_batch(model)
        batch["attention_mask"][:, 1:] = 0  # every token sees the first one alone
        batch.pop("token_type_ids", None)
        model.config.get_text_config()._attn_implementation = "eager"
        attention.config._attn_implementation = "eager"
        model(**batch)
    x, heads, out = (seen[name][0, 0] for name in ("x", "heads", "out"))
    total = torch.zeros_like(out)
    for index in range(layout.n_heads):
        value, output = (weights.of_head(Target(layer, index), kind) for kind in ("value", "output"))
        assert torch.allclose(heads[weights.block(index)], value @ x, atol=1e-4)
        total += output @ (value @ x)
    assert torch.allclose(out, total, atol=1e-3)


@pytest.mark.parametrize("name, group", [("llava-llama", 1), ("llava-qwen2", 2), ("llava-qwen3", 2)])
def test_groups_share_a_value_block(name: str, group: int) -> None:
    weights = HeadWeights(calibration_model(name))
    assert weights.group_size == group
    for head in (Target(1, 0), Target(1, 5)):
        members = weights.group(head)
        assert head in members
        assert len(members) == group
        blocks = {weights.of_head(member, "value").data_ptr() for member in members}
        assert len(blocks) == 1
        outside = Target(1, (members[-1].head + 1) % 8)
        assert weights.of_head(outside, "value").data_ptr() not in blocks


def test_slices_are_views_of_the_model() -> None:
    model = calibration_model("llava-qwen3")
    weights = HeadWeights(model)
    weights.slice(2, "output", 3).zero_()
    weights.slice(2, "value", 1).zero_()
    attention = model.model.language_model.layers[2].self_attn
    assert (attention.o_proj.weight.abs().sum(dim=0) == 0).nonzero().flatten().tolist() == list(range(24, 32))
    assert (attention.v_proj.weight.abs().sum(dim=1) == 0).nonzero().flatten().tolist() == list(range(8, 16))
    assert model.get_submodule(weights.names[2, "value"]) is weights.projections[2, "value"] is attention.v_proj


def steps_for(weights: HeadWeights) -> list[Scaled]:
    hidden, d = weights.layout.hidden_size, weights.layout.head_dim
    output = Edit(1, "output", 3, torch.randn(hidden, 2), torch.randn(2, d))
    value = Edit(0, "value", 2, torch.randn(d, 3), torch.randn(3, hidden))
    return [(Update((Target(1, 3),), (output,)), 0.1), (Update((Target(0, 2),), (value,)), 0.05)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_named_slices_change_and_only_meanwhile(dtype: torch.dtype) -> None:
    model = calibration_model().to(dtype)
    weights = HeadWeights(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = steps_for(weights)
    expected = {name: value.clone() for name, value in before.items()}
    for (update, alpha), key in zip(steps, ("1.self_attn.o_proj", "0.self_attn.v_proj"), strict=True):
        (edit,) = update.edits
        rows = slice(edit.index * 8, edit.index * 8 + 8)
        block = (slice(None), rows) if edit.kind == "output" else (rows, slice(None))
        name = f"model.language_model.layers.{key}.weight"
        expected[name][block] = (before[name][block].float() + alpha * (edit.left @ edit.right)).to(dtype)
        assert not torch.equal(expected[name], before[name])
    with applied(weights, steps):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError), applied(weights, steps):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fused_projections_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"model_name_or_path.*phi3.*v_proj.*fused"):
        HeadWeights(vlm("llava-phi3"))


def _under_an_adapter(attention: nn.Module) -> None:
    inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], r=2), attention)


def _in_eight_bits(attention: nn.Module) -> None:
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize("change", [_under_an_adapter, _in_eight_bits])
def test_weights_that_are_not_plain_are_refused_with_both_remedies(change: Callable[[nn.Module], None]) -> None:
    model = calibration_model()
    change(model.model.language_model.layers[1].self_attn)
    with pytest.raises(ValueError, match=r"quantized.*base model without quantization_bit.*dequantize"):
        HeadWeights(model)


def test_a_projection_that_is_not_laid_out_by_heads_is_refused() -> None:
    model = calibration_model()
    width = head_layout(model.config).hidden_size
    model.model.language_model.layers[0].self_attn.v_proj = nn.Linear(width, 60)
    with pytest.raises(ValueError, match=r"value projection is 60 wide.*8 heads of 8"):
        HeadWeights(model)


# -- the adapter -----------------------------------------------------------------------------------------------------

CONFIG = RahConfig(p_isal=80, p_caf=10, beta=0.2, k=3, rank=3, layers="0,2")


@pytest.fixture(params=["llava-llama", "llava-qwen2", "llava-qwen3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, list[Scaled], Path]:
    model = calibration_model(request.param)
    weights = HeadWeights(model)
    plan = make_plan(random_profile(), weights, CONFIG)
    steps = [(update, 0.15 / 2 ** (index % 3)) for index, update in enumerate(plan.updates)]
    save_adapter(tmp_path, weights, steps, "tiny/model")
    return model, steps, tmp_path


def batch() -> dict:
    rows = Rows([[image] for image in noise_images(3)])
    return collate([rows.encode(row) for row in range(3)])


def test_base_with_adapter_is_the_directly_edited_model(made: tuple) -> None:
    model, steps, folder = made
    with torch.no_grad():
        base = model(**batch()).logits
        with applied(HeadWeights(model), steps):
            direct = model(**batch()).logits
            edited = {name: value.clone() for name, value in model.state_dict().items()}
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), folder)
        unmerged = adapted(**batch()).logits
        merged = adapted.merge_and_unload()
    assert (direct - base).abs().max() > 1e-3
    scale = direct.abs().max()
    assert (unmerged - direct).abs().max() <= 1e-6 * scale
    for name, value in merged.state_dict().items():
        assert (value - edited[name]).abs().max() <= 1e-6, name


def test_other_heads_are_bit_equal_after_merging(made: tuple) -> None:
    model, steps, folder = made
    changed = {(edit.layer, edit.kind, edit.index) for update, _ in steps for edit in update.edits}
    merged = PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    before, after = HeadWeights(model), HeadWeights(merged)
    layout = before.layout
    for layer in range(layout.n_layers):
        for kind, n in (("value", layout.n_kv_heads), ("output", layout.n_heads)):
            for index in range(n):
                same = torch.equal(before.slice(layer, kind, index), after.slice(layer, kind, index))
                assert same == ((layer, kind, index) not in changed)
    touched = {before.names[layer, kind] + ".weight" for layer, kind, _ in changed}
    state = merged.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if name not in touched)


def test_the_adapter_is_peft_lora_whose_rank_is_what_each_layer_needs(made: tuple) -> None:
    model, steps, folder = made
    weights = HeadWeights(model)
    needed: dict[str, int] = {}
    for update, _ in steps:
        for edit in update.edits:
            name = weights.names[edit.layer, edit.kind]
            needed[name] = needed.get(name, 0) + 3
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert needed == config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == sorted(needed)
    assert len(set(needed.values())) > 1
    assert {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors} == set(needed)
    assert all(".layers.0." in name or ".layers.2." in name for name in tensors)
    assert all(tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank for name, rank in needed.items())
    assert (config["peft_type"], config["inference_mode"]) == ("LORA", True)
    assert config["base_model_name_or_path"] == "tiny/model"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
