"""From representations of the student into the teacher's space: what matching features needs."""

import torch
from torch import Tensor, nn


class Projector(nn.Module):
    """A two-layer MLP with GELU for each target, all targets at once.

    The hidden width is the teacher's: this project's choice, which keeps what is trained beside the model small.
    Initial values are drawn as :class:`torch.nn.Linear` draws them.
    """

    def __init__(self, n_targets: int, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.weight_in = _uniform((n_targets, dim, teacher_dim), dim)
        self.bias_in = _uniform((n_targets, 1, teacher_dim), dim)
        self.weight_out = _uniform((n_targets, teacher_dim, teacher_dim), teacher_dim)
        self.bias_out = _uniform((n_targets, 1, teacher_dim), teacher_dim)

    def forward(self, z: Tensor) -> Tensor:
        """``[n_targets, ..., D]`` to ``[n_targets, ..., D_teacher]``."""
        rows = z.flatten(1, -2)
        hidden = nn.functional.gelu(torch.baddbmm(self.bias_in, rows, self.weight_in))
        return torch.baddbmm(self.bias_out, hidden, self.weight_out).view(*z.shape[:-1], -1)


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = fan_in**-0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
