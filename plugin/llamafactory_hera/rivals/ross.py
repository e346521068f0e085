"""ROSS: a denoiser recovers an image's latents from the language model's outputs at the visual tokens.

The code follows Haochen-Wang409/ross, commit 20ffc6b, folder ``ross/model``: ``multimodal_denoiser/denoiser_dit.py``
for the denoiser, ``multimodal_denoiser/diffusion_utils`` for the diffusion, ``ross_arch.py`` for sampling steps
and noise, and ``pixel_decoder/flux_decoder.py`` for the latents.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..files import read_json
from ..hub import CONFIG_FILE
from ..objectives import Options, TokenBatch, TokenObjective, register
from ..teachers.encoder import KEY, teacher_fingerprint, teacher_folder

STEPS = 1000  #: number of diffusion steps
DRAWS = 4  #: pairs of diffusion step and noise sampled per image
_TIME_FEATURES = 256
_CLASS = "AutoencoderKL"
_WHAT = f"a diffusers {_CLASS} (the vae subfolder of a pipeline)"


class LatentTeacher:
    """The encoder of a frozen AutoencoderKL, with the attributes and methods of ``VisionTeacher``."""

    def __init__(self, model: Any, fingerprint: str) -> None:
        model.decoder = model.post_quant_conv = None  # unused, and more than half of the model
        self._model, self.fingerprint = model.eval().requires_grad_(False), fingerprint
        self.device: torch.device = model.device
        self.dim: int = 4 * model.config.latent_channels  # each token corresponds to 2 x 2 latents

    @staticmethod
    def check(name_or_path: str, side: int) -> Path:
        """Returns the folder of an AutoencoderKL, or raises ``ValueError``; images are resized to fit any ``side``."""
        if find_spec("diffusers") is None:
            raise ValueError(f"{KEY}: {name_or_path} needs diffusers, which is not installed; pip install diffusers.")
        config = read_json(teacher_folder(name_or_path, weights=False, what=_WHAT) / CONFIG_FILE)
        # both factors are needed to normalize the latents
        if config.get("_class_name") != _CLASS or None in map(config.get, ("shift_factor", "scaling_factor")):
            raise ValueError(
                f"{KEY}: {name_or_path} is not an {_CLASS} with a shift_factor and a scaling_factor; give {_WHAT}, "
                "such as FLUX.1-dev's."
            )
        return teacher_folder(name_or_path, what=_WHAT)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "LatentTeacher":
        """Loads the autoencoder in fp32, as in the authors' code, or raises ``ValueError``; ``dtype`` is ignored."""
        folder = cls.check(name_or_path, 0)
        from diffusers import AutoencoderKL

        model, loading = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            lack = f"{len(missing)} tensors, the first being {missing[0]}"
            raise ValueError(f"{KEY}: the weights of {name_or_path} lack {lack}; copy or download the weights again.")
        return cls(model.float().to(device), teacher_fingerprint(folder))

    @torch.no_grad()
    def patch_features(self, images: Tensor, side: int) -> Tensor:
        """Samples the latents of images ``[B, 3, S, S]`` in [0, 1], with the default generator of the device.

        Returns ``[B, side * side, dim]`` in fp32 on the teacher's device. The tokens are ordered row by row; each
        contains 2 x 2 latents, with channels in the order (latent channel, row, column).
        """
        config = self._model.config
        size = side * 2 ** len(config.block_out_channels)  # all levels but the last halve the size, as does packing
        with torch.autocast(self.device.type, enabled=False):
            pixels = 2 * images.to(self.device, torch.float32) - 1
            pixels = nn.functional.interpolate(pixels, (size, size), mode="bilinear")
            latents = self._model.encode(pixels).latent_dist.sample()
            packed = nn.functional.pixel_unshuffle((latents - config.shift_factor) * config.scaling_factor, 2)
        return packed.flatten(2).transpose(1, 2)


def alpha_bar() -> Tensor:
    """Returns the latents' share of the variance at each step, ``[STEPS]`` in float64 (arXiv 2102.09672, eq. 17)."""
    level = ((torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (level[1:] / level[:-1]).clamp(min=1 - 0.999).cumprod(0)


def grid_positions(side: int, width: int) -> Tensor:
    """Computes position embeddings ``[side * side, width]``: sines and cosines of a token's column, then its row."""
    rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    places = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return torch.cat([places.repeat(side, 1), places.repeat_interleave(side, 0)], dim=1)


def time_features(times: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes cosines and sines ``[..., 256]`` of diffusion steps ``[...]``."""
    half = _TIME_FEATURES // 2
    rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=times.device, dtype=dtype))
    angles = times[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """A DiT block (arXiv 2212.09748) whose norms and gates depend on a condition for each token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # no parameters, so shared
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Transforms tokens ``[N, T, width]`` under conditions of the same shape."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate * self._attention((1 + scale) * self.norm(x) + shift)
        return x + mlp_gate * self.mlp((1 + mlp_scale) * self.norm(x) + mlp_shift)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """Predicts the noise in an image's latents, given a language-model vector of size ``dim`` at each place."""

    positions: Tensor

    def __init__(self, side: int, channels: int, dim: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("positions", grid_positions(side, width), persistent=False)
        self.embed = nn.Linear(channels, width)
        self.embed_time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_token = nn.Sequential(nn.SiLU(), nn.Linear(dim, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.last = nn.Linear(width, channels)
        linear = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for name, module in linear.items():
            nn.init.zeros_(module.bias)
            if name == "last" or "modulation" in name:
                nn.init.zeros_(module.weight)
            elif name.startswith(("embed_time", "embed_token")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)

    def forward(self, noisy: Tensor, times: Tensor, z: Tensor) -> Tensor:
        """Predicts the noise in latents ``[n, B, T, channels]`` at steps ``[n, B]``, given vectors ``[B, T, D]``."""
        token = self.embed_token(nn.functional.layer_norm(z, z.shape[-1:]))
        time = self.embed_time(time_features(times, z.dtype))
        condition = (time[:, :, None] + token).flatten(0, 1)
        x = self.embed(noisy.flatten(0, 1)) + self.positions
        for block in self.blocks:
            # recomputed, because the four noise samples of a 729-token image would take 1 GB; nothing is random
            x = checkpoint(block, x, condition, use_reentrant=False, preserve_rng_state=False)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.last((1 + scale) * self.norm(x) + shift).unflatten(0, times.shape)


@register("ross")
class Ross(TokenObjective):
    """The mean squared error of the noise predicted from the visual tokens, over four samples of noise per image."""

    teacher_class = LatentTeacher
    # no teacher cache, because every step samples new latents from the posterior
    reads = ("hera_objective_lr", "hera_objective_from")
    granularities = ("layer",)
    silent_steps = 2  # the first step changes only the last layer, the second the layers that set norms and gates
    width, depth, heads = 1024, 3, 16
    levels: Tensor

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.n_targets != 1:
            raise ValueError(f"hera_layers: ross reads one layer, not {options.n_targets}; set hera_layers: final.")
        sizes = (options.side, options.teacher_dim, options.dim)
        self.denoiser = Denoiser(*sizes, self.width, self.depth, self.heads)
        share = alpha_bar()
        # the factors of latents and noise at each diffusion step, [2, STEPS]
        self.register_buffer("levels", torch.stack([share, 1 - share]).sqrt().float(), persistent=False)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Computes the loss of each sample, with diffusion steps and noise from the device's default generator."""
        latents = batch.teacher
        times = torch.randint(STEPS, (DRAWS, len(latents)), device=latents.device)
        noise = torch.randn(DRAWS, *latents.shape, device=latents.device)
        return self.loss(batch.tokens[0], latents, times, noise)[None]

    def loss(self, z: Tensor, latents: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Averages the squared error over noise samples, places and channels to ``[B]``, in fp32 despite autocast."""
        latents_level, noise_level = self.levels[:, times, None, None]
        with torch.autocast(z.device.type, enabled=False):
            predicted = self.denoiser(latents_level * latents + noise_level * noise, times, z)
        return (predicted - noise).square().mean(dim=(0, 2, 3))
