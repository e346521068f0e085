"""Reads all heads and layers at once, averaged over the tokens of a forward pass, without gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.neighbors import full_precision
from .families import decoder_layers, head_layout, model_config, output_projection
from .tokens import pool_tokens


@torch.no_grad()
def pooled_heads(model: nn.Module, mask: Tensor, run: Callable[[], object]) -> tuple[list[Tensor], Tensor]:
    """Averages the outputs of heads and layers over the tokens of ``mask`` ``[B, T]``.

    ``run`` runs the model, or only its text decoder. The model may be wrapped by PEFT, but must not be sharded.

    Returns:
        For each layer, its heads' outputs ``[B, H, d]`` (slices of the output projection's input; H and d may differ
        between layers), and the outputs of all layers, ``[B, L, D]``; all in fp32 on the model's device.
    """
    size, layout = head_layout(model_config(model)).hidden_size, head_layout(model_config(model)).layers
    heads = [mask.new_zeros(len(mask), 0, 0, dtype=torch.float32) for _ in layout]
    outputs: list[Tensor] = []  # layers run in order

    def mean(hidden: Tensor) -> Tensor:
        with full_precision(hidden.device.type):
            return pool_tokens(hidden.detach().float(), mask)

    def before_projection(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads[index] = mean(inputs[0]).unflatten(-1, (layout[index].n_heads, layout[index].head_dim))

    def after_layer(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # a layer of Gemma 3n returns several streams, and none of them is the residual stream
        outputs.append(mean(hidden) if hidden.dim() == 3 else hidden.new_full((len(mask), size), torch.nan).float())

    with ExitStack() as undo:
        for index, layer in enumerate(decoder_layers(model)):
            if layout[index].n_heads:
                projection = output_projection(layer, layout[index])
                undo.callback(projection.register_forward_pre_hook(partial(before_projection, index)).remove)
            undo.callback(layer.register_forward_hook(after_layer).remove)
        run()
    return heads, torch.stack(outputs, dim=1)


@torch.no_grad()
def projection_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yields the effective output projection ``[D, H * d]`` of each layer, or ``[D, 0]`` for a layer without heads."""
    layout = head_layout(model_config(model))
    for layer, heads in zip(decoder_layers(model), layout.layers, strict=True):
        width = heads.n_heads * heads.head_dim
        if not width:
            yield torch.zeros(layout.hidden_size, 0)
            continue
        projection = output_projection(layer, heads)
        if type(projection) is nn.Linear:
            yield projection.weight.detach()
            continue
        # packed 4-bit weights are integers, so the layer's norm determines the dtype
        like = next(p for p in (*projection.parameters(), *layer.parameters()) if p.is_floating_point())
        # correct for LoRA, DoRA and 4-bit weights; a row of zeros is projected to the bias
        unit = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
        with full_precision(like.device.type):
            image = projection(unit.unsqueeze(0))[0]
        yield (image[:width] - image[width:]).T
