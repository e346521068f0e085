"""JARVIS: the first layers of the language model predict the teacher's features of blocks of an image they do not see.

After the code of its authors (aimagelab/JARVIS); the blocks are drawn as I-JEPA (arXiv 2301.08243) draws them.
"""

import math

import torch
from torch import Tensor, nn

from ..alignment.losses import cosine_loss
from .base import Objective, Options, Plan, Step, TokenBatch, register

# of aimagelab/JARVIS: src/train/args.py, and scripts/train/st1_jarvis.sh for the chance
_N_TARGETS, _TARGET_SCALES, _TARGET_ASPECTS = 4, (0.15, 0.2), (0.75, 1.5)
_CONTEXT_SCALES, _SQUARE = (0.85, 1.0), (1.0, 1.0)
_TOO_FEW, _TRIES = 10, 20  # src/train/collators.py: a context of so few tokens is drawn again, so often
_PLAIN = 0.2  # chance of a micro-batch without masks


@register("jarvis")
class Jarvis(Objective):
    """One minus the cosine of what is predicted at four target blocks and the teacher there, mean over their tokens.

    A learned vector stands in the place of every target's token. A target sees itself and the context, a large block
    without the targets; text behind the image sees context and targets; nobody sees the rest of the image. One in five
    micro-batches is a plain one without a term. ``hera_visual_attention: two_way`` lets visual tokens see one another
    in both directions, as the authors do; ``causal`` cuts all that with the causal mask.
    """

    view = "patches"
    granularities = ("layer",)
    plans_attention = True
    one_image = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.z = nn.Parameter(torch.randn(options.dim) * options.initializer_range)
        # as wide as the teacher (src/models/mllm_jepa/modeling_mllm_jepa.py): 1024 for DINOv2-L
        first = nn.Linear(options.dim, options.teacher_dim, bias=False)
        self.head = nn.Sequential(first, nn.GELU(), nn.Linear(options.teacher_dim, options.teacher_dim, bias=False))

    def prepare(self, step: Step) -> Plan:
        """Draws the blocks of each sample, and whether the micro-batch is a plain one."""
        # the same on all processes: in a plain one z has no gradient, and gradients are averaged over all of them
        plain = float(torch.rand((), generator=step.generator(shared=True))) < _PLAIN or self.options.weight == 0
        return self.plan(step, *draw_blocks(step.side, len(step.positions), step.generator()), plain)

    def plan(self, step: Step, targets: Tensor, context: Tensor, plain: bool = False) -> Plan:
        """The plan of a micro-batch for what :func:`draw_blocks` gave; a ``plain`` one has no masks and no term."""
        device = step.input_ids.device
        if device.type != "cpu":  # from pinned memory the host does not wait for the copy
            targets, context = (drawn.pin_memory().to(device, non_blocking=True) for drawn in (targets, context))
        places = targets.flatten(1)
        positions, facts = step.positions.gather(1, places), {"places": places}
        if plain:
            return Plan(positions, nobody=True, facts=facts)
        masked = torch.where(step.valid.unsqueeze(1), positions, -1)
        seen = visible(step, targets, context, self.options.visual_attention == "two_way")
        return Plan(positions, seen, (masked, self.z), facts=facts)

    def forward(self, batch: TokenBatch) -> Tensor:
        """The loss of each target and sample."""
        places = batch.facts["places"].unsqueeze(-1).expand(-1, -1, batch.teacher.shape[-1])
        return cosine_loss(self.head(batch.tokens), batch.teacher.gather(1, places)).mean(dim=-1)


def draw_blocks(side: int, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws targets and contexts, of one size each for all samples, on a grid of ``side`` x ``side`` tokens.

    No block reaches the last row and column, as in the source. Targets may overlap one another.

    Returns:
        Places of the targets' tokens in the grid ``[n_samples, 4, n]``, and boolean ``[n_samples, side * side]``: the
        context.
    """
    target = _size(side, _TARGET_SCALES, _TARGET_ASPECTS, generator)
    context = _size(side, _CONTEXT_SCALES, _SQUARE, generator)
    drawn = [_block(side, target, generator) for _ in range(n_samples * _N_TARGETS)]
    targets = torch.stack(drawn).view(n_samples, _N_TARGETS, -1)
    return targets, torch.stack([_context(side, context, of_sample, generator) for of_sample in targets])


def visible(step: Step, targets: Tensor, context: Tensor, two_way: bool) -> Tensor:
    """Which token (row) sees which, boolean ``[B, L, L]``; samples without an image are causal, padding is closed.

    After src/models/mllm_jepa/modeling_mllm_jepa.py of the source.

    Args:
        step: The micro-batch.
        targets: Places of the blocks' tokens in the grid, ``[B, blocks, n]``.
        context: Boolean ``[B, T]``.
        two_way: Visual tokens see one another in both directions; else nothing sees what stands behind it.
    """

    def of_text(grid: Tensor) -> Tensor:
        """From ``[B, T]`` to the positions in the text ``[B, L]``."""
        inside = grid & step.valid.unsqueeze(1)
        return torch.zeros_like(step.attention_mask).scatter(1, step.positions, inside)

    at = torch.arange(step.input_ids.shape[1], device=step.input_ids.device)
    visual = of_text(torch.ones_like(context))
    behind = at > step.positions[:, -1:]
    blocks = context.new_zeros(*targets.shape[:2], context.shape[1]).scatter(2, targets, True)
    opened = _outer(behind, of_text(blocks.any(dim=1))) | (of_text(context) | ~visual).unsqueeze(1)
    for block in blocks.unbind(dim=1):
        opened |= _outer(of_text(block), of_text(block))
    direction = at.unsqueeze(1) >= at
    if two_way:
        direction = direction | _outer(visual, visual)
    return opened & direction & step.attention_mask.unsqueeze(1)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _size(
    side: int, scales: tuple[float, float], aspects: tuple[float, float], generator: torch.Generator
) -> tuple[int, int]:
    """Height and width of a block; one number draws both its scale and its aspect, as in the source."""
    drawn = float(torch.rand((), generator=generator))
    scale, aspect = (least + drawn * (most - least) for least, most in (scales, aspects))
    n_tokens = int(side * side * scale)
    height, width = round(math.sqrt(n_tokens * aspect)), round(math.sqrt(n_tokens / aspect))
    return max(min(height, side - 1), 1), max(min(width, side - 1), 1)


def _block(side: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The places of a block's tokens, its corner drawn."""
    top, left = (int(torch.randint(side - extent, (), generator=generator)) for extent in size)
    places = torch.arange(side * side).view(side, side)
    return places[top : top + size[0], left : left + size[1]].flatten()


def _context(side: int, size: tuple[int, int], targets: Tensor, generator: torch.Generator) -> Tensor:
    """A block less the targets, boolean ``[side * side]``; the last target may stay where too few would, then more."""
    context = torch.zeros(side * side, dtype=torch.bool)
    for n_left_out in range(len(targets), -1, -1):
        for _ in range(_TRIES):
            context = torch.zeros_like(context).index_fill(0, _block(side, size, generator), True)
            context[targets[:n_left_out].flatten()] = False
            if int(context.sum()) > _TOO_FEW:
                return context
    return context  # a grid too small for so many
