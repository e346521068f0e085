"""Feature matching: a projector, trained with the model, maps visual tokens to the teacher's patch features."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..alignment.losses import cosine_loss
from .base import Options, register
from .tokens import TokenBatch, TokenObjective

_WIDTH = 2048  # the width of VIRAL's official projector (cvlab-kaist/VIRAL, llava_llama.py)


@register("feature")
class Feature(TokenObjective):
    """One minus the cosine of projected visual tokens and the teacher's patches (the paper's ablation, sec. 4.2)."""

    reads = (*TokenObjective.reads, "hera_projector")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.projectors = _projectors(options, separate=options.config.projector == "separate")

    def forward(self, batch: TokenBatch) -> Tensor:
        """Computes the loss of each target and sample."""
        # one target at a time, because the projector's hidden layers for all heads at once would take four times
        # the memory of the tokens (5 heads, 4 images of 729 tokens: 0.48 GB)
        loss = partial(checkpoint, self._loss, use_reentrant=False, preserve_rng_state=False)
        return torch.stack([loss(target, batch) for target in range(self.options.n_targets)])

    def _loss(self, target: int, batch: TokenBatch) -> Tensor:
        projector = cast(nn.Sequential, self.projectors[target % len(self.projectors)])
        predicted = projector[1:](batch.linear(target, cast(nn.Linear, projector[0])))
        return cosine_loss(predicted, batch.teacher).mean(dim=-1)


@register("viral")
class Viral(Feature):
    """VIRAL (arXiv 2509.07979) at a decoder layer; its authors use it only in stage 2, with weight 0.5."""

    granularities = ("layer",)


def _projectors(options: Options, separate: bool) -> nn.ModuleList:
    """Creates one projector for all targets, as VIRAL and REPA do, or a smaller projector for each target."""
    dim, out = options.dim, options.teacher_dim
    if separate:
        return nn.ModuleList(
            nn.Sequential(nn.Linear(dim, out), nn.GELU(), nn.Linear(out, out)) for _ in range(options.n_targets)
        )
    hidden = [nn.Linear(dim, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH), nn.SiLU()]
    shared = nn.Sequential(*hidden, nn.Linear(_WIDTH, out))
    for name, parameter in shared.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.02)
    return nn.ModuleList([shared])
