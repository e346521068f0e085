"""Reads all heads and layers at once, averaged over the tokens of a forward pass, without gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.scoring import full_precision
from .families import decoder_layers, head_layout, model_config, output_projection
from .tokens import pool_tokens


@torch.no_grad()
def pooled_heads(model: nn.Module, mask: Tensor, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Averages head outputs ``[B, L, H, d]`` and layer outputs ``[B, L, D]`` over the tokens of ``mask`` ``[B, T]``.

    ``run`` runs the model, or only its text decoder. A head's output is its slice of the output projection's input,
    averaged as soon as the layer has run, so that no tokens are kept. The averages are in fp32 on the model's device.
    The model may be under PEFT, but must be complete on this process.
    """
    layout = head_layout(model_config(model))
    heads: list[Tensor] = []  # by layer, because layers run in order
    outputs: list[Tensor] = []

    def mean(hidden: Tensor) -> Tensor:
        # values outside the mask do not count, not even NaN
        kept = hidden.detach().masked_fill(~mask.unsqueeze(-1), 0).float()
        with full_precision(kept.device.type):
            return pool_tokens(kept, mask)

    def before_projection(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads.append(mean(inputs[0]))

    def after_layer(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(mean(output[0] if isinstance(output, tuple) else output))

    with ExitStack() as undo:
        for layer in decoder_layers(model):
            undo.callback(output_projection(layer).register_forward_pre_hook(before_projection).remove)
            undo.callback(layer.register_forward_hook(after_layer).remove)
        run()
    return torch.stack(heads, dim=1).unflatten(-1, (layout.n_heads, layout.head_dim)), torch.stack(outputs, dim=1)


@torch.no_grad()
def projection_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yields the effective output projection ``[D, H * d]`` of each decoder layer, one at a time.

    Unless the module is a plain linear layer, the weight is computed by projecting the unit vectors, which is correct
    for LoRA, DoRA and 4-bit weights.
    """
    layout = head_layout(model_config(model))
    width = layout.n_heads * layout.head_dim
    for layer in decoder_layers(model):
        projection = output_projection(layer)
        if type(projection) is nn.Linear:
            yield projection.weight.detach()
            continue
        # packed 4-bit weights are integers; in that case, the layer's norm determines the dtype
        like = next(p for p in (*projection.parameters(), *layer.parameters()) if p.is_floating_point())
        # the last row is zero, so its image is the bias
        unit = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
        with full_precision(like.device.type):
            image = projection(unit.unsqueeze(0))[0]
        yield (image[:width] - image[width:]).T
