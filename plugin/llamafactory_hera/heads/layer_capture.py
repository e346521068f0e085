"""Reading the outputs of chosen decoder layers from one forward pass, with gradient: averaged, or at chosen tokens.

Under gradient checkpointing a layer's output carries gradient only outside the checkpointed function: rows are then
read from what that function returns, and otherwise by a forward hook.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import head_layout, model_config
from .hooks import LayerHooks, in_backward
from .pooling import pool_tokens
from .targets import Target, Targets


class LayerCapture(LayerHooks):
    """Captures the outputs of chosen decoder layers while it is entered::

        with LayerCapture(model, "L14,L15") as capture:
            capture.pool(mask)
            loss = model(**batch).loss
            z = capture.representations()

    Args:
        model: A transformers model, bare or wrapped by PEFT, DDP, FSDP or DeepSpeed.
        layers: ``Targets`` of layers, or their names: ``"L14,L15"``, or one by one.

    Raises:
        ValueError: Unknown architecture, or a layer outside the model.
    """

    def __init__(self, model: nn.Module, layers: Targets | str | Iterable[Target | str]) -> None:
        targets = layers if isinstance(layers, Targets) else Targets.parse(layers, "layer")
        targets.check(head_layout(model_config(model)))
        super().__init__(model, targets.layers)
        self._order = [item.layer for item in targets.items]
        self._read: Callable[[Tensor], Tensor] | None = None
        self._inside: set[int] = set()  # layers whose checkpointed function is running

    def remove(self) -> None:
        """Takes every hook away and forgets what was captured."""
        super().remove()
        self._read = None

    def pool(self, mask: Tensor | None) -> None:
        """Averages the next forward pass over the tokens of a mask ``[B, T]``; None captures nothing."""
        self._read = None if mask is None else lambda hidden: pool_tokens(hidden, mask)
        self._start_pass()

    def tokens(self, positions: Tensor) -> None:
        """Takes the next forward pass at the given token positions of each row, ``[B, n]``."""
        self._read = lambda hidden: hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        self._start_pass()

    def representations(self) -> Tensor:
        """What the last forward pass gave.

        Returns:
            ``[n_layers, B, D]`` of averages, ``[n_layers, B, n, D]`` of tokens; layers in the order in which they were
            given.

        Raises:
            RuntimeError: No forward pass was captured.
        """
        self._check_captured()
        return torch.stack([self._rows[index] for index in self._order])

    def _hook(self) -> None:
        for index, layer in self._layers.items():
            self._undo.append(layer.register_forward_hook(partial(self._after, index)).remove)

    def _after(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        if index not in self._inside and not in_backward():
            self._keep(index, output)

    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointing(*args: Any, **kwargs: Any) -> Any:
            self._inside.add(index)
            try:
                output = original(*args, **kwargs)
            finally:
                self._inside.discard(index)
            self._keep(index, output)
            return output

        return checkpointing

    def _keep(self, index: int, output: Any) -> None:
        if self._read is None:
            return
        rows = self._read(output[0] if isinstance(output, tuple) else output)
        self._watch(index, rows)
        self._rows[index] = rows
