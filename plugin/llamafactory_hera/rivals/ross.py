"""ROSS: a denoiser must recover an image's latents from the visual tokens that the language model puts out.

What is computed follows Haochen-Wang409/ross, commit 20ffc6b, under ``ross/model``: the denoiser is that of
``multimodal_denoiser/denoiser_dit.py``, the diffusion of ``diffusion_utils/gaussian_diffusion.py`` there, the draws of
``ross_arch.py``.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..objectives import Options, TokenBatch, TokenObjective, register
from .latents import LatentTeacher

#: Steps of the diffusion.
STEPS = 1000
#: Pairs of a step and noise that are drawn for an image.
DRAWS = 4
_TIME_FEATURES = 256
_MAX_BETA = 0.999


def alpha_bar() -> Tensor:
    """``[STEPS]`` in float64: the share of the latents' variance that is left at each step of the cosine schedule.

    Nichol and Dhariwal (arXiv 2102.09672), eq. 17, by its ratios of neighbors, which are cut so that some is left.
    """
    level = ((torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (level[1:] / level[:-1]).clamp(min=1 - _MAX_BETA).cumprod(0)


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed sines and cosines of a token's column, then of its row: ``[side * side, width]``, row by row."""
    rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    places = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return torch.cat([places.repeat(side, 1), places.repeat_interleave(side, 0)], dim=1)


def time_features(times: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of steps of any shape, ``[..., 256]``."""
    half = _TIME_FEATURES // 2
    rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=times.device, dtype=dtype))
    angles = times[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Block(nn.Module):
    """A transformer block whose norms and gates are set by a condition of each token: DiT's (arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # without values: one serves both places
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[N, T, width]`` from tokens and conditions of that shape."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate * self._attention((1 + scale) * self.norm(x) + shift)
        return x + mlp_gate * self.mlp((1 + mlp_scale) * self.norm(x) + mlp_shift)

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """Predicts the noise in an image's latents, given a vector of the language model for each place.

    Its blocks are computed again in the backward pass: four draws of an image of 729 tokens would keep a gigabyte.

    Args:
        side: Places along a side of the grid.
        channels: Of the latents of a place.
        dim: Size D of the language model's vectors; ``width``, ``depth`` and ``heads`` are the blocks'.
    """

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
        self._initialize()

    def _initialize(self) -> None:
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
        """The noise, of the shape of ``noisy``.

        Args:
            noisy: Latents ``[n, B, T, channels]``.
            times: Steps of the diffusion ``[n, B]``.
            z: ``[B, T, D]``, the same for all n draws of an image.
        """
        token = self.embed_token(nn.functional.layer_norm(z, z.shape[-1:]))
        time = self.embed_time(time_features(times, z.dtype))
        condition = (time[:, :, None] + token).flatten(0, 1)
        x = self.embed(noisy.flatten(0, 1)) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, condition, use_reentrant=False, preserve_rng_state=False)  # it draws nothing
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return self.last((1 + scale) * self.norm(x) + shift).unflatten(0, times.shape)


@register("ross")
class Ross(TokenObjective):
    """Mean squared error of the predicted noise in an image's latents, given the visual tokens; four draws an image.

    A new denoiser predicts 0 whatever it is given: the loss begins at 1, the mean square of the noise.

    Raises:
        ValueError: More than one layer is aligned.
    """

    teacher_class = LatentTeacher
    # no cache: every step draws another sample of the posterior
    reads = ("hera_objective_lr", "hera_objective_from")
    granularities = ("layer",)
    # the first step at a rate above 0 moves the last layer alone, the second what makes norms and gates of a condition
    silent_steps = 2
    width, depth, heads = 1024, 3, 16
    levels: Tensor

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.n_targets != 1:
            raise ValueError(f"hera_layers: ross reads one layer, not {options.n_targets}; its own is `final`.")
        sizes = (options.side, options.teacher_dim, options.dim)
        self.denoiser = Denoiser(*sizes, self.width, self.depth, self.heads)
        left = alpha_bar()
        # factors of latents and noise: [2, STEPS]
        self.register_buffer("levels", torch.stack([left, 1 - left]).sqrt().float(), persistent=False)

    def forward(self, batch: TokenBatch) -> Tensor:
        """The loss of each sample; steps and noise come from the device's default generator."""
        latents = batch.teacher
        times = torch.randint(STEPS, (DRAWS, len(latents)), device=latents.device)
        noise = torch.randn(DRAWS, *latents.shape, device=latents.device)
        return self.loss(batch.tokens[0], latents, times, noise)[None]

    def loss(self, z: Tensor, latents: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """``[B]``, mean over draws, places and channels; in fp32, also in a training step under autocast.

        Args:
            z: ``[B, T, D]``.
            latents: ``[B, T, channels]``.
            times: Steps ``[n, B]``, from 0.
            noise: ``[n, B, T, channels]``.
        """
        latents_level, noise_level = self.levels[:, times, None, None]
        with torch.autocast(z.device.type, enabled=False):
            found = self.denoiser(latents_level * latents + noise_level * noise, times, z)
        return (found - noise).square().mean(dim=(0, 2, 3))
