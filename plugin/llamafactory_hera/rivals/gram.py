"""Gram matching: the similarities between the visual tokens of an image are those between the teacher's patches.

This is the Gram loss of LaVer (arXiv 2512.06281; Fir-lat/LaVer at 4ce7bd9, ``src/llamafactory/model/laver``) with a
frozen vision encoder as teacher; docs/rivals.md lists the differences.
"""

from torch import Tensor

from ..alignment.neighbors import similarity
from ..objectives import TokenBatch, TokenObjective, register


@register("gram")
class Gram(TokenObjective):
    """The mean squared difference of the two matrices of cosine similarities, ``[T, T]``, of each image."""

    granularities = ("layer",)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Computes the loss of each target and sample; the objective has no parameters."""
        student, teacher = (similarity(tokens, tokens) for tokens in (batch.tokens, batch.teacher))
        return (student - teacher).square().mean(dim=(-2, -1))
