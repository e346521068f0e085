"""JARVIS: the first layers of the language model predict the teacher's features of hidden image blocks.

The code follows the authors' implementation (aimagelab/JARVIS); blocks are sampled as in I-JEPA (arXiv 2301.08243).
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.losses import cosine_loss
from ..distributed import rank
from ..heads.families import decoder_layers
from ..objectives import Options, Plan, Step, TokenBatch, TokenObjective, register
from .decoder_inputs import DecoderInputs

logger = logging.getLogger("llamafactory_hera")

# Values of aimagelab/JARVIS: src/train/args.py, and scripts/train/st1_jarvis.sh for `_PLAIN`.
_N_TARGETS, _TARGET_SCALES, _TARGET_ASPECTS = 4, (0.15, 0.2), (0.75, 1.5)
_CONTEXT_SCALES, _SQUARE = (0.85, 1.0), (1.0, 1.0)
_Range = tuple[float, float]
_TOO_FEW, _TRIES = 10, 20  # src/train/collators.py: a context of at most 10 tokens is sampled again, up to 20 times
_PLAIN = 0.2  # the probability that a micro-batch has no masks and no JARVIS loss


@register("jarvis")
class Jarvis(TokenObjective):
    """One minus the cosine of prediction and teacher features in four target blocks, averaged over their tokens.

    A learned vector replaces every token of a target block. The context is a large block without the targets. A target
    sees itself and the context. Text after the image sees context and targets. No token sees the rest of the image.
    One in five micro-batches is plain: it has no masks, and only its LM loss counts. With
    ``hera_visual_attention: two_way``, visual tokens see each other in both directions, as in the authors' code.
    Samples with several images enter only the LM loss.
    """

    granularities = ("layer",)
    reads = (*TokenObjective.reads, "hera_visual_attention")
    _inputs: DecoderInputs

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.z = nn.Parameter(torch.randn(options.dim) * options.initializer_range)
        # as wide as the teacher (src/models/mllm_jepa/modeling_mllm_jepa.py): 1024 for DINOv2-L
        first = nn.Linear(options.dim, options.teacher_dim, bias=False)
        self.head = nn.Sequential(first, nn.GELU(), nn.Linear(options.teacher_dim, options.teacher_dim, bias=False))
        self._two_way = options.config.visual_attention == "two_way"

    @classmethod
    def check_model(cls, model_config: Any, attention: str | None) -> None:
        """Refuses FlashAttention, which accepts no mask per pair of tokens, and layers with a sliding window."""
        if attention not in (None, "auto", "disabled", "sdpa", "eager"):
            raise ValueError(f"attn_implementation: {attention} accepts no mask, which jarvis needs; set sdpa.")
        text = model_config.get_text_config()
        kinds = getattr(text, "layer_types", None) or [getattr(text, "sliding_window", None) or "full_attention"]
        if set(kinds) != {"full_attention"}:
            why = f"{text.model_type} has layers with a sliding window or chunks"
            raise ValueError(f"hera_objective: jarvis sets the attention mask, but {why}; use another model.")

    def attach(self, model: nn.Module) -> None:
        """Hooks the text decoder, and warns if the model would learn with attention that differs from inference."""
        self._inputs = DecoderInputs(model, self._two_way)
        self._inputs.install()
        trained = any(p.requires_grad for layer in decoder_layers(model) for p in layer.parameters())
        if rank() == 0 and self.options.config.weight > 0 and (self._two_way or trained):
            logger.warning(
                "hera_objective: jarvis changes the attention during training; train only the projector, as its "
                "authors do. If you trained with hera_visual_attention: two_way, evaluate the model inside "
                "llamafactory_hera.rivals.decoder_inputs.DecoderInputs(model, two_way=True)."
            )

    def detach(self) -> None:
        """Removes the hooks, unless the model was trained with two-way attention and must keep it."""
        if not self._two_way:
            self._inputs.remove()

    def prepare(self, step: Step) -> Plan:
        """Samples the blocks of each image, and hides the targets in the next pass; a plain pass is unchanged."""
        self._inputs.install()
        # All processes choose alike, because they average gradients, and z has none in a plain micro-batch.
        plain = float(torch.rand((), generator=step.generator(shared=True))) < _PLAIN
        targets, context = draw_blocks(step.side, len(step.positions), step.generator())
        device = step.input_ids.device
        if device.type != "cpu":  # the CPU does not wait for copies from pinned memory
            targets, context = (drawn.pin_memory().to(device, non_blocking=True) for drawn in (targets, context))
        places = targets.flatten(1)
        positions, valid = step.positions.gather(1, places), step.valid & (step.n_images == 1)
        if plain or self.options.config.weight == 0:
            return Plan(positions, torch.zeros_like(valid), {"places": places})
        seen = visible(step, valid, targets, context, self._two_way)
        self._inputs.set(seen, (torch.where(valid.unsqueeze(1), positions, -1), self.z))
        return Plan(positions, valid, {"places": places})

    def forward(self, batch: TokenBatch) -> Tensor:
        """Computes the loss of each target and sample."""
        places = batch.context["places"].unsqueeze(-1).expand(-1, -1, batch.teacher.shape[-1])
        return cosine_loss(self.head(batch.tokens), batch.teacher.gather(1, places)).mean(dim=-1)


def draw_blocks(side: int, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples targets and contexts on a grid of ``side`` x ``side`` tokens; block sizes are equal for all samples.

    Returns the grid indices of the targets' tokens, ``[n_samples, 4, n]``, and the context, boolean
    ``[n_samples, side * side]``. No block reaches the last row or column, as in the source. Targets may overlap.
    """
    target = _size(side, _TARGET_SCALES, _TARGET_ASPECTS, generator)
    context = _size(side, _CONTEXT_SCALES, _SQUARE, generator)
    drawn = [_block(side, target, generator) for _ in range(n_samples * _N_TARGETS)]
    targets = torch.stack(drawn).view(n_samples, _N_TARGETS, -1)
    return targets, torch.stack([_context(side, context, of_sample, generator) for of_sample in targets])


def visible(step: Step, valid: Tensor, targets: Tensor, context: Tensor, two_way: bool) -> Tensor:
    """Computes which tokens (last axis) each token sees, ``[B, L, L]``, as the authors' modeling_mllm_jepa.py does."""

    def of_text(grid: Tensor) -> Tensor:
        """Converts a mask over the grid, ``[B, T]``, to a mask over the sequence, ``[B, L]``."""
        return torch.zeros_like(step.attention_mask).scatter(1, step.positions, grid & valid.unsqueeze(1))

    at = torch.arange(step.input_ids.shape[1], device=step.input_ids.device)
    visual = of_text(torch.ones_like(context))
    after = at > step.positions[:, -1:]
    blocks = context.new_zeros(*targets.shape[:2], context.shape[1]).scatter(2, targets, True)
    opened = _outer(after, of_text(blocks.any(dim=1))) | (of_text(context) | ~visual).unsqueeze(1)
    for block in blocks.unbind(dim=1):
        opened |= _outer(of_text(block), of_text(block))
    direction = at.unsqueeze(1) >= at
    if two_way:
        direction = direction | _outer(visual, visual)
    return opened & direction & step.attention_mask.unsqueeze(1)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def _size(side: int, scales: _Range, aspects: _Range, generator: torch.Generator) -> tuple[int, int]:
    """Samples a block's height and width; one number decides both scale and aspect, as in the authors' code."""
    drawn = float(torch.rand((), generator=generator))
    scale, aspect = (least + drawn * (most - least) for least, most in (scales, aspects))
    n_tokens = int(side * side * scale)
    height, width = round(math.sqrt(n_tokens * aspect)), round(math.sqrt(n_tokens / aspect))
    return max(min(height, side - 1), 1), max(min(width, side - 1), 1)


def _block(side: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Samples the corner of a block, and returns the grid indices of the block's tokens."""
    top, left = (int(torch.randint(side - extent, (), generator=generator)) for extent in size)
    places = torch.arange(side * side).view(side, side)
    return places[top : top + size[0], left : left + size[1]].flatten()


def _context(side: int, size: tuple[int, int], targets: Tensor, generator: torch.Generator) -> Tensor:
    """Samples a block and removes the targets from it, or fewer targets if too few tokens would remain."""
    context = torch.zeros(side * side, dtype=torch.bool)
    for n_left_out in range(len(targets), -1, -1):
        for _ in range(_TRIES):
            context = torch.zeros_like(context).index_fill(0, _block(side, size, generator), True)
            context[targets[:n_left_out].flatten()] = False
            if int(context.sum()) > _TOO_FEW:
                return context
    return context  # the grid is too small for more
