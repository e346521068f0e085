"""Profiling a set of samples: I-SAL and CAF of all of them, which logits count, and taking a profile up again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from llamafactory_hera.calibration.measure import AttentionFlow, HeadGates
from llamafactory_hera.calibration.profile import Profile, check_tokens, profile_heads, weights_digest
from llamafactory_hera.calibration.samples import draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.selection.forward import Forward
from tests.calibration.tiny import N_IMAGE, Rows, calibration_model, collate, noise_images
from tests.tiny_models import IMAGE

LAYERS, HEADS = 4, 8


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
    assert profile.flow.shape == profile.gradients.shape[1:] == (LAYERS, HEADS)
    assert torch.allclose(profile.flow, torch.stack(flows).double().mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.maps, torch.stack(maps).mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.gradients, torch.stack(gradients[:3]), atol=1e-5)


def test_samples_with_more_image_tokens_are_brought_to_the_fewest() -> None:
    images = noise_images(3)
    rows = Rows([[images[0]], [images[1], images[2]]])
    samples = [rows.encode(row) for row in range(2)]
    profile = profile_heads(Forward(calibration_model()), samples, collate, RahConfig(probes=1, batch_size=1))
    assert profile.maps.shape == (LAYERS, HEADS, N_IMAGE)


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


def projection(dtype: torch.dtype = torch.float32, width: int = N) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, N, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [N, 33])  # rows of 33 bf16 values do not fill whole words
def test_every_single_value_counts_in_the_digest(dtype: torch.dtype, width: int) -> None:
    linear = projection(dtype, width)
    seen = {weights_digest(linear), weights_digest(projection(dtype, width))}
    assert len(seen) == 1
    places = [(0, 0), (0, width - 1), (N - 1, 0), (100, 17), (101, 17), (100, 18), (7, 32)]
    for row, column in places:
        changed = projection(dtype, width)
        with torch.no_grad():
            changed.weight[row, column] *= 1.01
        seen.add(weights_digest(changed))
    with torch.no_grad():
        linear.bias[N - 1] *= 1.01
    seen.add(weights_digest(linear))
    assert len(seen) == len(places) + 2


@pytest.mark.parametrize("dim", [0, 1])
def test_heads_in_another_order_count_in_the_digest(dim: int) -> None:
    linear, before = projection(), weights_digest(projection())
    with torch.no_grad():
        linear.weight.copy_(projection().weight.roll(64, dims=dim))
    assert weights_digest(linear) != before


def test_the_output_of_any_head_counts_in_the_digest() -> None:
    """What a calibration changes: one head's columns, of a width that a stride over the flat weight would miss."""
    width = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    digests = set()
    for head in range(-1, 8):
        model = calibration_model("llava-llama", **width)
        if head >= 0:
            with torch.no_grad():
                model.get_decoder().layers[1].self_attn.o_proj.weight[:, head * 32 : (head + 1) * 32].mul_(1.001)
        digests.add(weights_digest(model))
    assert len(digests) == 9


def test_weights_need_not_start_at_a_whole_word() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(4 * 4 + 1)[1:].view(4, 4))
    assert len(weights_digest(module)) == 64
