"""Profiling a set of samples, and taking it up again."""

import pytest
import torch

from llamafactory_hera.calibration.attention_maps import AttentionFlow
from llamafactory_hera.calibration.forward import Forward
from llamafactory_hera.calibration.gates import HeadGates
from llamafactory_hera.calibration.influence import margin_loss
from llamafactory_hera.calibration.profile import Profile, profile_heads
from tests.calibration.tiny import N_IMAGE, Rows, calibration_model, collate, noise_images

LAYERS, HEADS = 4, 8


def features(n: int = 7) -> list[dict]:
    rows = Rows([[image] for image in noise_images(n)])
    return [rows.encode(row) for row in range(n)]


def test_a_profile_is_the_mean_of_single_samples() -> None:
    model, samples = calibration_model(), features()
    forward = Forward(model)
    profile = profile_heads(forward, samples, collate, probes=3, batch_size=4)
    flows, maps, gradients = [], [], []
    for sample in samples:
        batch = collate([sample])
        with AttentionFlow(model, N_IMAGE) as flow, torch.no_grad():
            flow.expect(*forward.modalities(batch))
            forward.run(batch)
            one_flow, one_map = flow.take()
        flows.append(one_flow[0])
        maps.append(one_map[0])
        with HeadGates(model) as gates:
            gates.reset(1)
            gradients.append(gates.gradients(margin_loss(*forward.logits(batch)))[0])
    assert profile.flow.shape == profile.gradients.shape[1:] == (LAYERS, HEADS)
    assert torch.allclose(profile.flow, torch.stack(flows).double().mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.maps, torch.stack(maps).mean(dim=0), atol=1e-7)
    assert torch.allclose(profile.gradients, torch.stack(gradients[:3]), atol=1e-5)


def test_samples_with_more_image_tokens_are_brought_to_the_fewest() -> None:
    model = calibration_model()
    images = noise_images(3)
    rows = Rows([[images[0]], [images[1], images[2]]])
    samples = [rows.encode(row) for row in range(2)]
    profile = profile_heads(Forward(model), samples, collate, probes=1, batch_size=1)
    assert profile.maps.shape == (LAYERS, HEADS, N_IMAGE)


def test_a_profile_is_found_again_by_its_key_alone(tmp_path) -> None:
    path = tmp_path / "profile.safetensors"
    profile = profile_heads(Forward(calibration_model()), features(), collate, probes=2, batch_size=2)
    assert Profile.load(path, "a") is None
    profile.save(path, "a")
    found = Profile.load(path, "a")
    assert all(torch.equal(getattr(found, name), getattr(profile, name)) for name in ("flow", "maps", "gradients"))
    assert Profile.load(path, "b") is None
    path.write_bytes(path.read_bytes()[:100])
    assert Profile.load(path, "a") is None
    assert [file.name for file in tmp_path.iterdir()] == ["profile.safetensors"]


def test_a_broken_checkpoint_is_named() -> None:
    model = calibration_model()
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model_name_or_path.*NaN or infinity.*bf16 or fp32"):
        profile_heads(Forward(model), features(3), collate, probes=2, batch_size=2)
