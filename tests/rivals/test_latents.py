"""The latents that ROSS recovers, from a tiny random autoencoder of diffusers."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamafactory_hera.rivals.ross import LatentTeacher
from tests.tiny_models import autoencoder, edit_json

diffusers = pytest.importorskip("diffusers")

SIDE, CHANNELS, PIXELS = 4, 3, 16  # each place has 2 x 2 latents, and each latent has 2 x 2 pixels
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = autoencoder(8, CHANNELS, 4)
    for name, parameter in model.named_parameters():
        if "conv2" in name or "to_out" in name:
            parameter.data *= 0.1  # new blocks have a wider view than trained blocks
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def load(folder: Path) -> LatentTeacher:
    return LatentTeacher.from_pretrained(str(folder), "cpu")


def latents_of(teacher: LatentTeacher, images: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return teacher.patch_features(images, SIDE)


def test_latents_are_sampled_shifted_scaled_and_packed_by_two_by_two(folder):
    images = torch.rand(2, 3, 2 * PIXELS, 2 * PIXELS)
    # without antialiasing, halving the size averages two by two pixels
    pixels = torch.nn.functional.avg_pool2d(images, 2) * 2 - 1
    posterior = diffusers.AutoencoderKL.from_pretrained(folder).encode(pixels).latent_dist
    torch.manual_seed(1)
    z = (posterior.mean + posterior.std * torch.randn(2, CHANNELS, 2 * SIDE, 2 * SIDE) - 0.25) * 0.5
    teacher = load(folder)
    found = latents_of(teacher, images)
    assert found.shape == (2, SIDE * SIDE, teacher.dim)
    for place in range(SIDE * SIDE):
        y, x = 2 * (place // SIDE), 2 * (place % SIDE)
        window = [z[:, c, y + p1, x + p2] for c in range(CHANNELS) for p1 in (0, 1) for p2 in (0, 1)]
        torch.testing.assert_close(found[:, place], torch.stack(window, 1), atol=1e-5, rtol=1e-5)
    assert not latents_of(teacher, images, seed=2).equal(found)  # a sample, not the mean


def test_it_is_frozen_and_in_fp32_under_autocast_and_with_weights_in_bf16(folder):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    teacher, images = load(folder), torch.rand(1, 3, PIXELS, PIXELS, requires_grad=True)
    found = latents_of(teacher, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert latents_of(teacher, images).equal(found)
    for name, parameter in teacher._model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.equal(weights[name].float())
        assert not parameter.requires_grad


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "is not an AutoencoderKL with .*; give a diffusers .*sub-folder vae"),
        ({"shift_factor": None}, "is not an AutoencoderKL with a shift_factor and a scaling_factor; give"),
    ],
)
def test_a_folder_of_another_model_is_refused(damage, message, folder):
    assert LatentTeacher.check(str(folder), SIDE) == folder
    edit_json(folder / "config.json", **damage)
    with pytest.raises(ValueError, match=f"^hera_teacher: .*{re.escape(str(folder))}.*{message}"):
        LatentTeacher.check(str(folder), SIDE)


def test_without_diffusers_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"^hera_teacher: .* needs diffusers, .* pip install diffusers"):
        LatentTeacher.check(str(folder), SIDE)


def test_weights_that_lack_a_tensor_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^hera_teacher: .*lack 1 tensors, .* encoder\.conv_in\.weight.*again"):
        load(folder)
