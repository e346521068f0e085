"""Reads every head and every layer at once: averages over the tokens of a forward pass, without gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.scoring import full_precision
from .families import decoder_layers, head_layout, model_config, output_projection
from .hooks import Hooks
from .tokens import pool_tokens


class PooledHeads(Hooks):
    """Captures the head outputs and layer outputs of a text decoder, averaged over tokens, while it is entered::

        with PooledHeads(model) as pooled, torch.no_grad():
            pooled.pool(mask)
            model(**batch)
            heads, layers = pooled.take()

    A head's output is its slice of the output projection's input. It is averaged as soon as its layer has run, so that
    the tokens of no layer are kept. The model may be under PEFT, but must be whole on this process.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        self._layers = decoder_layers(model)
        self._heads: list[Tensor] = []  # layers run in their order
        self._outputs: list[Tensor] = []

    def _hook(self) -> None:
        for layer in self._layers:
            projection = output_projection(layer)
            self._undo.append(projection.register_forward_pre_hook(self._before_projection).remove)
            self._undo.append(layer.register_forward_hook(self._after_layer).remove)

    def pool(self, mask: Tensor) -> None:
        """Sets the tokens ``[B, T]`` over which the next forward pass averages, and drops the last pass."""
        self._mask = mask
        self._heads.clear()
        self._outputs.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns head outputs ``[B, L, H, d]`` and layer outputs ``[B, L, D]`` in fp32 on the model's device."""
        heads = torch.stack(self._heads, dim=1).unflatten(-1, (self._layout.n_heads, self._layout.head_dim))
        return heads, torch.stack(self._outputs, dim=1)

    def _before_projection(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._heads.append(self._mean(inputs[0]))

    def _after_layer(self, _: nn.Module, __: Any, output: Any) -> None:
        self._outputs.append(self._mean(output[0] if isinstance(output, tuple) else output))

    def _mean(self, hidden: Tensor) -> Tensor:
        """Averages in fp32, whatever the model computes in; values outside the mask do not count, not even NaN."""
        kept = hidden.detach().masked_fill(~self._mask.unsqueeze(-1), 0).float()
        with full_precision(kept.device.type):
            return pool_tokens(kept, self._mask)


@torch.no_grad()
def projection_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yields the effective output projection ``[D, H * d]`` of each decoder layer, one at a time.

    Unless the module is a plain linear layer, it projects the unit vectors, so that the weight is right for LoRA, DoRA
    and 4-bit weights.
    """
    layout = head_layout(model_config(model))
    width = layout.n_heads * layout.head_dim
    for layer in decoder_layers(model):
        projection = output_projection(layer)
        if type(projection) is nn.Linear:
            yield projection.weight.detach()
            continue
        # packed 4-bit weights are integers; the norm of the layer then gives the type
        like = next(p for p in (*projection.parameters(), *layer.parameters()) if p.is_floating_point())
        # the last row is zero and gives the bias
        unit = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)
        with full_precision(like.device.type):
            image = projection(unit.unsqueeze(0))[0]
        yield (image[:width] - image[width:]).T
