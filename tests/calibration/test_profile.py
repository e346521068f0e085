"""I-SAL and CAF: the paper's formulas written out, hooks against what the model itself returns, and the file."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.profile import (
    AttentionFlow,
    HeadGates,
    Profile,
    attention_flow,
    check_tokens,
    counted_logits,
    margin_loss,
    profile_heads,
    weights_digest,
)
from llamafactory_hera.calibration.samples import draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.heads.families import attention_module, decoder_layers, head_layout, output_projection
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import N_IMAGE, Rows, calibration_model, collate, noise_images
from tests.tiny_models import HEADS, IMAGE, LAYERS, VLMS, vlm, vlm_batch


@pytest.mark.parametrize("text, image", [([0, 4, 5], [1, 2, 3, 6]), ([3, 4, 5, 6], [0, 1, 2])])
def test_flow_is_the_mean_of_both_directions(text: list[int], image: list[int]) -> None:
    scores = torch.randn(5, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    attention = scores.softmax(dim=-1)
    flow, maps = attention_flow(attention, torch.tensor(text), torch.tensor(image), len(image))
    for head in range(5):
        to_image = sum(attention[head, i, j] for i in text for j in image) / (len(text) * len(image))
        to_text = sum(attention[head, i, j] for i in image for j in text) / (len(image) * len(text))
        assert flow[head] == pytest.approx((0.5 * (to_image + to_text)).item(), rel=1e-6)
        expected = [sum(attention[head, i, j] for i in text) / len(text) for j in image]
        assert torch.allclose(maps[head], torch.stack(expected))
        assert (to_text == 0) == (min(text) > max(image))  # image tokens see nothing of the text behind them


def test_half_precision_is_averaged_in_single_precision_and_a_shorter_map_keeps_its_mass() -> None:
    attention = (torch.rand(2, 200, 200) * 1e-2).bfloat16()
    tokens = torch.arange(150), torch.arange(150, 200)
    flow, maps = attention_flow(attention, *tokens, 25)
    exact_flow, exact_maps = attention_flow(attention.float(), *tokens, 50)
    assert torch.equal(flow, exact_flow)
    assert torch.allclose(maps, exact_maps.unflatten(1, (25, 2)).sum(dim=2))


# -- reading attention -----------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> list[nn.Module]:
    return [attention_module(layer) for layer in decoder_layers(model)]


def flows(model: nn.Module, batch: dict[str, Any], bins: int = 4) -> list[tuple[torch.Tensor, ...]]:
    with AttentionFlow(Forward(model), bins) as attention:
        return attention.read(batch)


@pytest.mark.parametrize("name", VLMS)
def test_captured_flow_is_that_of_the_attention_that_the_model_returns(name: str) -> None:
    model = vlm(name).eval()
    # sdpa has no place for the sinks of gpt-oss
    assert (model.config.get_text_config()._attn_implementation == "sdpa") == (name != "llava-gpt_oss")
    batch = vlm_batch(model, rows=3)
    n_image = int((batch["input_ids"][0] == IMAGE).sum())
    found = flows(model, batch, n_image)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        returned = model(**batch, output_attentions=True, use_cache=False).attentions
    for row, (flow, maps) in enumerate(found):
        assert flow.shape == (LAYERS, HEADS)
        image = batch["input_ids"][row] == IMAGE
        text = batch["attention_mask"][row].bool() & ~image
        tokens = text.nonzero().flatten(), image.nonzero().flatten()
        for layer in range(LAYERS):
            expected = attention_flow(returned[layer][row], *tokens, n_image)
            assert torch.allclose(flow[layer], expected[0], atol=1e-7)
            assert torch.allclose(maps[layer], expected[1], atol=1e-7)
    assert len(found) == 3


def test_one_layer_of_attention_is_held_at_a_time() -> None:
    model = vlm("llava-llama", num_hidden_layers=5).eval()
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def count(_: nn.Module, __: Any, output: tuple) -> None:
        alive.append(weakref.ref(output[1]))
        counts.append(sum(reference() is not None for reference in alive))

    for attention in attentions(model):
        attention.register_forward_hook(count)
    flows(model, vlm_batch(model))
    assert counts == [1] * 5


def test_reading_attention_leaves_the_model_as_it_was() -> None:
    model = vlm("llava-qwen3").eval()
    batch = vlm_batch(model)
    with torch.no_grad():
        before = model(**batch).logits
    with AttentionFlow(Forward(model), 4) as attention:
        assert model.config.text_config._attn_implementation == "eager"
        assert model.config.vision_config._attn_implementation == "sdpa"
        attention.read(batch)
    with pytest.raises(KeyError), AttentionFlow(Forward(model), 4):
        raise KeyError
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    assert not any(attention._forward_hooks for attention in attentions(model))
    assert all(attention.config._attn_implementation == "sdpa" for attention in attentions(model))


def test_flow_does_not_depend_on_the_batch() -> None:
    model = vlm("llava-qwen2").eval()
    batch = vlm_batch(model, rows=3)
    for row, (flow, _) in enumerate(flows(model, batch)):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        assert torch.allclose(flows(model, alone)[0][0], flow, atol=1e-7)


# -- logits, the margin loss and gates -------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["text", "all", "last"])
@pytest.mark.parametrize("name", VLMS)
def test_logits_at_the_tokens_that_count(name: str, positions: str) -> None:
    model = vlm(name).eval()
    batch = vlm_batch(model, rows=3)
    with torch.no_grad():
        logits, counted = counted_logits(Forward(model), batch | {"labels": batch["input_ids"]}, positions)
        everything = model(**batch).logits
    ids, attended = batch["input_ids"], batch["attention_mask"].bool()
    expected = {"text": attended & (ids != IMAGE), "all": attended}.get(positions)
    if expected is None:
        expected = torch.zeros_like(attended)
        expected[range(3), attended.sum(dim=1) - 1] = True
    assert torch.allclose(logits[counted], everything[expected], atol=1e-5)
    assert counted.sum() == expected.sum()


def test_no_more_logits_are_computed_than_count_and_in_the_runs_type() -> None:
    model = vlm("llava-llama").eval()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    batch, forward = vlm_batch(model), Forward(model, autocast=torch.bfloat16)
    assert counted_logits(forward, batch, "text")[0].dtype == torch.bfloat16
    counted_logits(forward, {name: value[:1] for name, value in batch.items()}, "last")
    forward.run(batch)
    assert rows == [int((batch["input_ids"][0] != IMAGE).sum()), 1, 1]


def test_margin_loss_is_the_log_ratio_of_the_two_largest_probabilities() -> None:
    logits = torch.randn(2, 5, 9) * 3
    positions = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]).bool()
    for row, loss in enumerate(margin_loss(logits.masked_fill(~positions[..., None], torch.nan), positions)):
        ratios = []
        for t in positions[row].nonzero().flatten():
            first, second, *_ = sorted(logits[row, t].softmax(dim=0).tolist(), reverse=True)
            ratios.append(torch.tensor(first / second).log().item())
        assert loss.item() == pytest.approx(-sum(ratios) / len(ratios), rel=1e-5)


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return margin_loss(*counted_logits(Forward(model), batch, "text"))


def gate_gradients(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    with HeadGates(Forward(model), "text") as gates:
        return gates.read(batch)


def loss_with(model: nn.Module, batch: dict[str, Any], layer: int, head: int, gate: float) -> torch.Tensor:
    """The loss of a copy of the model that has the gate in its weights."""
    changed = copy.deepcopy(model)
    layout = head_layout(changed.config)
    weight = output_projection(decoder_layers(changed)[layer]).weight
    with torch.no_grad():
        weight[:, head * layout.head_dim : (head + 1) * layout.head_dim] *= gate
        return loss_of(changed, batch)


@pytest.mark.parametrize("name", ["llava-llama", "llava-qwen2", "llava-qwen3", "gemma3"])
def test_gradients_are_those_of_each_samples_loss(name: str) -> None:
    model = vlm(name).eval().double()
    batch = vlm_batch(model, rows=3)
    batch["pixel_values"] = batch["pixel_values"].double()
    gradients = gate_gradients(model, batch)
    assert gradients.shape == (3, LAYERS, HEADS)
    step = 1e-3  # the loss is computed from logits in single precision
    for layer, head in ((0, 0), (0, HEADS - 1), (LAYERS - 1, 1)):
        up, down = (loss_with(model, batch, layer, head, 1 + sign * step) for sign in (1, -1))
        assert torch.allclose(gradients[:, layer, head], (up - down) / (2 * step), rtol=1e-2, atol=1e-3)
    assert gradients.abs().max() > 0.01


@pytest.mark.parametrize("name", VLMS)
def test_open_gates_change_nothing(name: str) -> None:
    model = vlm(name).eval().bfloat16().requires_grad_(False)
    batch = vlm_batch(model)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, __, output: logits.append(output.logits))
    loss_of(model, batch)
    assert gate_gradients(model, batch).abs().sum() > 0
    assert torch.equal(*logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- all samples -----------------------------------------------------------------------------------------------------


def features(n: int = 7) -> list[dict]:
    rows = Rows([[image] for image in noise_images(n)])
    return [rows.encode(row) for row in range(n)]


def profile_of(flow: torch.Tensor, gradients: torch.Tensor) -> Profile:
    return Profile(flow.double(), torch.zeros(*flow.shape, 1), gradients)


def test_saliency_is_the_standard_score_of_each_layer() -> None:
    flow = torch.rand(3, 8) * 1e-3  # attention weights over hundreds of tokens are small
    flow[2] = 0.25  # equal heads stand at zero
    saliency = profile_of(flow, torch.zeros(1, 3, 8)).saliency
    for layer in range(2):
        row = flow[layer].double()
        mean = sum(row) / 8
        deviation = (sum((value - mean) ** 2 for value in row) / 8) ** 0.5
        assert torch.allclose(saliency[layer], (row - mean) / deviation, rtol=1e-6)
    assert torch.equal(saliency[2], torch.zeros(8, dtype=torch.double))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_caf_is_the_signed_mean_gradient_and_its_weighted_mean_square(weight: float) -> None:
    gradients = torch.randn(6, 2, 3)
    caf = profile_of(torch.rand(2, 3), gradients).influence(weight)
    for layer in range(2):
        for head in range(3):
            values = gradients[:, layer, head].tolist()
            expected = sum(values) / 6 + weight * sum(value**2 for value in values) / 6
            assert caf[layer, head].item() == pytest.approx(expected, rel=1e-5)


def test_a_profile_is_the_mean_of_single_samples() -> None:
    model, samples = calibration_model(), features()
    forward = Forward(model)
    profile = profile_heads(forward, samples, collate, RahConfig(probes=3, batch_size=4))
    batches = [collate([sample]) for sample in samples]
    with AttentionFlow(forward, N_IMAGE) as attention:
        flows, maps = zip(*(attention.read(batch)[0] for batch in batches), strict=True)
    with HeadGates(forward, "text") as gates:
        gradients = [gates.read(batch)[0] for batch in batches]
    assert profile.flow.shape == profile.gradients.shape[1:] == (4, 8)
    assert torch.allclose(profile.flow, torch.stack(flows).double().mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.maps, torch.stack(maps).mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.gradients, torch.stack(gradients[:3]), atol=1e-5)


def test_samples_with_more_image_tokens_are_brought_to_the_fewest() -> None:
    images = noise_images(3)
    rows = Rows([[images[0]], [images[1], images[2]]])
    samples = [rows.encode(row) for row in range(2)]
    profile = profile_heads(Forward(calibration_model()), samples, collate, RahConfig(probes=1, batch_size=1))
    assert profile.maps.shape == (4, 8, N_IMAGE)


@pytest.mark.parametrize("kind, ids", [("image", [3, 4]), ("text", [IMAGE] * 4)])
def test_a_sample_without_one_kind_of_token_is_named(kind: str, ids: list[int]) -> None:
    forward = Forward(calibration_model())
    samples = draw_samples(Rows([[image] for image in noise_images(4)]), RahConfig(samples=4, held_out=1, probes=1))
    check_tokens(forward, samples.profiled)
    samples.profiled[2].features["input_ids"] = ids
    with pytest.raises(ValueError, match=rf"sample {samples.profiled[2].row} .*no {kind} token.*template"):
        check_tokens(forward, samples.profiled)


def test_a_broken_checkpoint_is_named() -> None:
    model = calibration_model()
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model_name_or_path.*NaN or infinity.*bf16 or fp32"):
        profile_heads(Forward(model), features(3), collate, RahConfig(probes=2, batch_size=2))


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_profile_is_found_again_by_its_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    profile = Profile(torch.rand(4, 8).double(), torch.rand(4, 8, 5), torch.randn(6, 4, 8))
    assert Profile.load(path, "a") is None
    profile.save(path, "a")
    found = Profile.load(path, "a")
    assert all(torch.equal(getattr(found, name), getattr(profile, name)) for name in ("flow", "maps", "gradients"))
    assert Profile.load(path, "b") is None
    path.write_bytes(path.read_bytes()[:100])
    assert Profile.load(path, "a") is None
    assert [file.name for file in tmp_path.iterdir()] == ["profile.safetensors"]


N = 256  # as in real models, a multiple of any even stride


def projection(dtype: torch.dtype, width: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, N, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [N, 33])  # rows of 33 bf16 values do not fill whole words
def test_every_value_every_head_and_their_order_count_in_the_digest(dtype: torch.dtype, width: int) -> None:
    places = [(0, 0), (0, width - 1), (N - 1, 0), (100, 17), (101, 17), (100, 18), (7, 32)]
    heads = [(slice(None), slice(start, start + 32)) for start in range(0, width - 1, 32)]
    digests = [weights_digest(projection(dtype, width)) for _ in range(2)]
    assert len(set(digests)) == 1
    for place in (*places, *heads):
        changed = projection(dtype, width)
        with torch.no_grad():
            changed.weight[place] *= 1.01
        digests.append(weights_digest(changed))
    for dim in (0, 1):
        changed = projection(dtype, width)
        with torch.no_grad():
            changed.weight.copy_(changed.weight.roll(64 if width == N else 8, dims=dim))
        digests.append(weights_digest(changed))
    changed = projection(dtype, width)
    with torch.no_grad():
        changed.bias[N - 1] *= 1.01
    digests.append(weights_digest(changed))
    assert len(set(digests)) == len(digests) - 1


def test_weights_need_not_start_at_a_whole_word() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4 * 4 + 1)[1:].view(4, 4))
    assert len(weights_digest(module)) == 64
