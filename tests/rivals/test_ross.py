"""ROSS: its denoiser and schedule compared with naive versions in float64, its first steps, and its latents."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from llamafactory_hera.objectives import TokenBatch, create
from llamafactory_hera.rivals.ross import DRAWS, STEPS, LatentTeacher, Ross, alpha_bar
from llamafactory_hera.training.optimizer import ObjectiveOptimizer
from tests.terms import options
from tests.tiny_models import autoencoder, edit_json

SIDE, B, D, C = 3, 3, 12, 8
T = SIDE * SIDE


class Small(Ross):
    width, depth, heads = 16, 2, 2


@pytest.fixture
def small() -> Small:
    """Makes a small objective whose parameters are all different from zero."""
    torch.manual_seed(0)
    ross = Small(options(n_targets=1, dim=D, teacher_dim=C, side=SIDE))
    with torch.no_grad():
        for parameter in ross.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return ross


def draws() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns z, latents, times and noise."""
    torch.manual_seed(1)
    noise = torch.randn(DRAWS, B, T, C)
    return torch.randn(B, T, D), torch.randn(B, T, C), torch.randint(STEPS, (DRAWS, B)), noise


def naive_alpha_bar(t: int) -> float:
    """Multiplies 1 - beta step by step."""

    def level(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(1 - level((i + 1) / 1000) / level(i / 1000), 0.999) for i in range(t + 1))


@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_the_schedule_is_the_cosine_schedule_with_bounded_steps(t, small):
    expected = naive_alpha_bar(t)
    assert alpha_bar()[t].item() == pytest.approx(expected, rel=1e-9)
    assert small.levels[:, t].tolist() == pytest.approx([math.sqrt(expected), math.sqrt(1 - expected)], rel=1e-6)


def norm(x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=eps)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    return x @ module.weight.detach().double().T + module.bias.detach().double()


def sinusoids(value: float, size: int) -> tuple[list[float], list[float]]:
    angles = [value * 10_000 ** (-i / size) for i in range(size)]
    return [math.sin(angle) for angle in angles], [math.cos(angle) for angle in angles]


def naive_denoiser(ross: Small, noisy: Tensor, t: int, z: Tensor) -> Tensor:
    """Predicts the noise in one draw of an image's latents ``[T, C]``, given its tokens ``[T, D]``."""
    net = ross.denoiser
    sines, cosines = sinusoids(t, 128)
    time = linear(net.embed_time[2], silu(linear(net.embed_time[0], torch.tensor(cosines + sines).double())))
    condition = silu(time + linear(net.embed_token[1], silu(norm(z, 1e-5))))
    places = []
    for place in range(T):
        column, row = (sinusoids(at, ross.width // 4) for at in (place % SIDE, place // SIDE))
        places.append([*column[0], *column[1], *row[0], *row[1]])
    x = linear(net.embed, noisy) + torch.tensor(places).double()
    for block in net.blocks:
        shift, scale, gate, shift2, scale2, gate2 = linear(block.modulation[1], condition).chunk(6, dim=-1)
        qkv = linear(block.qkv, norm(x, 1e-6) * (1 + scale) + shift)
        size = ross.width // ross.heads
        mixed = torch.empty_like(x)
        for head in range(ross.heads):
            q, k, v = (qkv[:, i * ross.width + head * size :][:, :size] for i in range(3))
            mixed[:, head * size : (head + 1) * size] = (q @ k.T / math.sqrt(size)).softmax(-1) @ v
        x = x + gate * linear(block.out, mixed)
        hidden = linear(block.mlp[0], norm(x, 1e-6) * (1 + scale2) + shift2)
        x = x + gate2 * linear(block.mlp[2], gelu(hidden, approximate="tanh"))
    shift, scale = linear(net.modulation[1], condition).chunk(2, dim=-1)
    return linear(net.last, norm(x, 1e-6) * (1 + scale) + shift)


def test_the_loss_is_the_squared_error_of_the_predicted_noise(small):
    z, latents, times, noise = draws()
    errors = torch.zeros(DRAWS, B).double()
    for n in range(DRAWS):
        for b in range(B):
            t = int(times[n, b])
            left, e = naive_alpha_bar(t), noise[n, b].double()
            noisy = math.sqrt(left) * latents[b].double() + math.sqrt(1 - left) * e
            errors[n, b] = (naive_denoiser(small, noisy, t, z[b].double()) - e).square().mean()
    found = small.loss(z, latents, times, noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert small.loss(z, latents, times, noise).equal(found)
    found = small.double().loss(z.double(), latents.double(), times, noise.double())
    torch.testing.assert_close(found, errors.mean(0), atol=1e-6, rtol=1e-6)


def test_a_new_denoiser_predicts_zero():
    z, latents, times, noise = draws()
    ross = Small(options(n_targets=1, dim=D, teacher_dim=C, side=SIDE))
    assert ross.loss(z, latents, times, noise).equal(noise.square().mean(dim=(0, 2, 3)))
    found = ross(TokenBatch(z[None], None, latents, torch.ones(B, dtype=torch.bool)))
    assert found.unique().numel() == B  # each image has its own draws
    assert found.mean().item() == pytest.approx(1.0, abs=0.1)


def test_the_student_receives_its_first_gradient_in_the_third_step():
    z, latents, times, noise = draws()
    z.requires_grad_()
    ross = Small(options(n_targets=1, dim=D, teacher_dim=C, side=SIDE))
    optimizer = ObjectiveOptimizer(ross)
    silent = []
    for _ in range(3):
        z.grad = None
        ross.loss(z, latents, times, noise).sum().backward()
        silent.append(not z.grad.any())
        optimizer.step(1e-3)
    assert silent == [True] * Ross.silent_steps + [False]


def test_blocks_are_recomputed_in_the_backward_pass(small):
    calls = []
    for block in small.denoiser.blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    loss = small.loss(*draws()).sum()
    assert calls == list(small.denoiser.blocks)
    loss.backward()
    assert calls[2:] == list(small.denoiser.blocks)[::-1]


def test_parameters_have_the_initial_values_and_the_number_of_the_authors_code():
    ross = create("ross", options(n_targets=1, dim=64, teacher_dim=64, side=2))
    bound = math.sqrt(6 / (1024 + 3072))
    spread = {"embed_time.0": 0.02, "embed_time.2": 0.02, "embed_token.1": 0.02}
    spread |= {"blocks.2.qkv": bound / math.sqrt(3), "embed": math.sqrt(2 / (1024 + 64))}
    spread |= dict.fromkeys(["blocks.0.modulation.1", "blocks.2.modulation.1", "modulation.1", "last"], 0.0)
    for name, expected in spread.items():
        linear = ross.denoiser.get_submodule(name)
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not linear.bias.any()
    with torch.device("meta"):
        ross = Ross(options(n_targets=1, dim=4096, teacher_dim=64, side=27))
    assert sum(parameter.numel() for parameter in ross.parameters()) == pytest.approx(64.4e6, rel=1e-3)


def test_several_layers_are_refused():
    with pytest.raises(ValueError, match="hera_layers: ross reads one layer, not 2"):
        Ross(options(n_targets=2, dim=D, teacher_dim=C, side=SIDE))


GRID, CHANNELS, PIXELS = 4, 3, 16  # each place has 2 x 2 latents, and each latent has 2 x 2 pixels
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = autoencoder(8, CHANNELS, 4)
    for name, parameter in model.named_parameters():
        if "conv2" in name or "to_out" in name:
            parameter.data *= 0.1  # untrained blocks see a wider region than trained blocks
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def load(folder: Path) -> LatentTeacher:
    return LatentTeacher.from_pretrained(str(folder), "cpu")


def latents_of(teacher: LatentTeacher, images: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return teacher.patch_features(images, GRID)


def test_latents_are_sampled_shifted_scaled_and_packed_by_two_by_two(folder):
    diffusers = pytest.importorskip("diffusers")
    images = torch.rand(2, 3, 2 * PIXELS, 2 * PIXELS)
    # without antialiasing, halving the size averages two by two pixels
    pixels = torch.nn.functional.avg_pool2d(images, 2) * 2 - 1
    posterior = diffusers.AutoencoderKL.from_pretrained(folder).encode(pixels).latent_dist
    torch.manual_seed(1)
    z = (posterior.mean + posterior.std * torch.randn(2, CHANNELS, 2 * GRID, 2 * GRID) - 0.25) * 0.5
    teacher = load(folder)
    found = latents_of(teacher, images)
    assert found.shape == (2, GRID * GRID, teacher.dim)
    for place in range(GRID * GRID):
        y, x = 2 * (place // GRID), 2 * (place % GRID)
        window = [z[:, c, y + p1, x + p2] for c in range(CHANNELS) for p1 in (0, 1) for p2 in (0, 1)]
        torch.testing.assert_close(found[:, place], torch.stack(window, 1), atol=1e-5, rtol=1e-5)
    assert not latents_of(teacher, images, seed=2).equal(found)  # a sample, not the mean


def test_the_autoencoder_is_frozen_and_in_fp32_under_autocast_and_with_weights_in_bf16(folder):
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
        ({"_class_name": "AutoencoderDC"}, "is not an AutoencoderKL with .*; give a diffusers .*vae subfolder"),
        ({"shift_factor": None}, "is not an AutoencoderKL with a shift_factor and a scaling_factor; give"),
    ],
)
def test_a_folder_of_another_model_is_refused(damage, message, folder):
    assert LatentTeacher.check(str(folder), GRID) == folder
    edit_json(folder / "config.json", **damage)
    with pytest.raises(ValueError, match=f"^hera_teacher: .*{re.escape(str(folder))}.*{message}"):
        LatentTeacher.check(str(folder), GRID)


def test_without_diffusers_the_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"^hera_teacher: .* needs diffusers, .* pip install diffusers"):
        LatentTeacher.check(str(folder), GRID)


def test_weights_that_lack_a_tensor_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^hera_teacher: .*lack 1 tensors, .* encoder\.conv_in\.weight.*again"):
        load(folder)
