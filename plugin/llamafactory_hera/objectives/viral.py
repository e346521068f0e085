"""VIRAL (arXiv 2509.07979): visual tokens of a decoder layer are mapped onto the teacher's patch features."""

import math

from torch import Tensor, nn

from ..alignment.losses import cosine_loss
from .base import Objective, Options, PatchBatch, register
from .projector import Projector


@register("viral")
class Viral(Objective):
    """One minus the cosine of each projected visual token and the teacher's patch at its place, mean over tokens."""

    view = "patches"
    granularities = ("layer",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.projector = Projector(options.n_targets, options.dim, options.teacher_dim)

    def forward(self, batch: PatchBatch) -> Tensor:
        """The loss of each target and sample."""
        side = math.isqrt(batch.z.shape[2])
        patches = batch.teacher.permute(0, 3, 1, 2)
        if patches.shape[2:] != (side, side):
            patches = nn.functional.interpolate(patches, (side, side), mode="bilinear", align_corners=False)
        target = patches.permute(0, 2, 3, 1).flatten(1, 2)  # [B, T, D_teacher]
        return cosine_loss(self.projector(batch.z), target).mean(dim=-1)
