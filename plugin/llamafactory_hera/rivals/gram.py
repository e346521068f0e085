"""Gram matching: similarities between an image's visual tokens should equal those between the teacher's patches.

This is the Gram loss of LaVer (arXiv 2512.06281; Fir-lat/LaVer at 4ce7bd9, ``src/llamafactory/model/laver``) with a
frozen vision encoder as the teacher; docs/rivals.md lists the differences.
"""

from torch import Tensor

from ..alignment.neighbors import similarity
from ..objectives import TokenBatch, TokenObjective, register


@register("gram")
class Gram(TokenObjective):
    """The mean squared difference between student and teacher cosine similarities, ``[T, T]`` for each image."""

    granularities = ("layer",)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Computes the loss of each target and sample; the objective has no parameters."""
        student, teacher = (similarity(tokens, tokens) for tokens in (batch.tokens, batch.teacher))
        return (student - teacher).square().mean(dim=(-2, -1))
