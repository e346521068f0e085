"""Reading the contributions of chosen heads from one forward pass, with gradient.

A head's contribution to the residual stream is ``W_O[:, h*d:(h+1)*d] @ o`` (paper, eq. 7), averaged over tokens. The
projection is linear, so the pooled head output is projected once. The output projection itself does that: while a
mask is set, the pooled rows, each zero outside its head, are appended to the token axis of the module's input and
split off its output. So the result is right whatever the module has become (LoRA, DoRA, 4-bit weights, parameters
sharded by ZeRO-3 or FSDP), because the module projects; slicing its weight would be wrong or fail for most of these.

Under gradient checkpointing the rows must be *returned* from the checkpointed function to carry gradient; the
checkpointing function of the chosen layers is wrapped for that.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .families import head_layout, model_config, output_projection
from .hooks import LayerHooks, in_backward
from .pooling import pool_tokens
from .targets import Target, Targets


class HeadCapture(LayerHooks):
    """Captures the pooled contributions of chosen heads while it is entered.

    Two ways to use it. Name the tokens before the forward pass; this works under gradient checkpointing and every
    sharding engine::

        with HeadCapture(model, heads) as capture:
            capture.pool(mask)
            loss = model(**batch).loss
            z = capture.representations()

    Or after it, for a plain model without gradient checkpointing::

        with HeadCapture(model, heads) as capture:
            loss = model(**batch).loss
            z = capture.representations(mask)

    Args:
        model: A transformers model, bare or wrapped by PEFT, DDP, FSDP or DeepSpeed.
        heads: ``Targets`` of heads, or their names: ``"L3H4,L7H6"``, or one by one.

    Raises:
        ValueError: Unknown architecture, or a head outside the model.
    """

    def __init__(self, model: nn.Module, heads: Targets | str | Iterable[Target | str]) -> None:
        targets = heads if isinstance(heads, Targets) else Targets.parse(heads)
        self.heads = targets.items
        self._layout = head_layout(model_config(model))
        targets.check(self._layout)
        super().__init__(model, targets.layers)
        self._heads_of = {
            index: [item.head for item in self.heads if item.layer == index and item.head is not None]
            for index in self._layers
        }
        self._mask: Tensor | None = None
        self._inputs: dict[int, Tensor] = {}
        self._keeps_inputs = False
        self._frames: dict[int, list[Tensor]] = {}  # rows on their way out of a checkpointed layer
        self._project: dict[int, Callable[..., Tensor]] = {}

    def install(self) -> None:
        """Hooks the chosen layers, once."""
        if not self._undo:
            self._keeps_inputs = True
        super().install()

    def remove(self) -> None:
        """Takes every hook away and forgets what was captured."""
        super().remove()
        self._mask = None
        self._keeps_inputs = False
        for held in (self._inputs, self._frames, self._project):
            held.clear()

    def pool(self, mask: Tensor | None) -> None:
        """Sets the tokens over which the next forward pass averages, ``[B, T]``; None captures nothing."""
        self._mask = mask
        self._keeps_inputs = False  # whoever names the tokens before needs no activations kept, least in evaluation
        self._inputs.clear()
        self._start_pass()

    def representations(self, mask: Tensor | None = None) -> Tensor:
        """The pooled contributions of the last forward pass.

        Args:
            mask: ``[B, T]``, the tokens to average over; only when :meth:`pool` was not called before the pass.

        Returns:
            ``[n_heads, B, D]``, heads in the order in which they were given.

        Raises:
            RuntimeError: No forward pass was captured, or its activations cannot carry gradient.
        """
        if mask is not None:
            self._project_inputs(mask)
        self._check_captured()
        by_head = {
            Target(index, head): self._rows[index][:, position]
            for index, heads in self._heads_of.items()
            for position, head in enumerate(heads)
        }
        return torch.stack([by_head[head] for head in self.heads])

    # -- inside the model ------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        for index, layer in self._layers.items():
            projection = output_projection(layer, self._layout.model_type)
            self._replace(projection, "forward", self._projection_forward(index, projection))

    def _projection_forward(self, index: int, projection: nn.Module) -> Callable[..., Tensor]:
        original = self._project[index] = projection.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._mask is None:
                if self._keeps_inputs and not in_backward():
                    self._inputs[index] = hidden
                return original(hidden, *args, **kwargs)
            pooled = pool_tokens(hidden, self._mask)
            self._watch(index, pooled)
            extended = torch.cat([hidden, self._head_rows(index, projection, pooled)], dim=1)
            output = original(extended, *args, **kwargs)
            # a copy: a view would keep the layer's whole output alive for as long as the rows
            rows = self._without_bias(output[:, hidden.shape[1] :].clone(), self._heads_of[index])
            if index in self._frames:
                self._frames[index].append(rows)
            elif not in_backward():
                self._rows[index] = rows
            return output[:, : hidden.shape[1]]

        return forward

    def _head_rows(self, index: int, projection: nn.Module, pooled: Tensor) -> Tensor:
        """Pooled head outputs ``[B, H*d]`` as projection inputs ``[B, n, H*d]``, each zero outside its head."""
        dim = self._layout.head_dim
        selector = pooled.new_zeros(len(self._heads_of[index]), self._layout.n_heads, dim)
        for position, head in enumerate(self._heads_of[index]):
            selector[position, head] = 1
        rows = pooled.unsqueeze(1) * selector.flatten(1)
        if _has_bias(projection):  # the image of a zero row is the bias, whatever the module has become
            rows = torch.cat([rows, rows.new_zeros(rows.shape[0], 1, rows.shape[2])], dim=1)
        return rows

    @staticmethod
    def _without_bias(rows: Tensor, heads: list[int]) -> Tensor:
        n = len(heads)
        return rows if rows.shape[1] == n else rows[:, :n] - rows[:, n:]

    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointing(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mask = self._mask
            if mask is None:
                return original(function, *args, **kwargs)

            def run(_: nn.Module, *run_args: Any, **run_kwargs: Any) -> tuple:
                # runs again in the backward pass, when another mask may be set
                outer_mask, self._mask, self._frames[index] = self._mask, mask, []
                try:
                    output = function(*run_args, **run_kwargs)
                    rows = self._frames[index][0]
                finally:
                    self._mask = outer_mask
                    del self._frames[index]
                return (*output, rows) if isinstance(output, tuple) else (output, rows)

            # the host's checkpointing function finds the layer as the `__self__` of what it is given
            *output, rows = original(MethodType(run, layer), *args, **kwargs)
            self._rows[index] = rows
            return output[0] if len(output) == 1 else tuple(output)

        return checkpointing

    def _project_inputs(self, mask: Tensor) -> None:
        for index, layer in self._layers.items():
            hidden = self._inputs.get(index)
            if hidden is None:
                continue
            if torch.is_grad_enabled() and layer.training and getattr(layer, "gradient_checkpointing", False):
                raise RuntimeError(
                    "Under gradient checkpointing the activations seen here carry no gradient: call "
                    "`capture.pool(mask)` before the forward pass and `representations()` without a mask."
                )
            projection = output_projection(layer, self._layout.model_type)
            rows = self._head_rows(index, projection, pool_tokens(hidden, mask))
            self._rows[index] = self._without_bias(self._project[index](rows), self._heads_of[index])


def _has_bias(projection: nn.Module) -> bool:
    # its own, that of the layer inside an adapter, or the adapter's
    return any(getattr(module, "bias", None) is not None for module in projection.modules())
