"""Removable hooks on a model, and the rows that they keep from chosen decoder layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from .families import FINAL, decoder_layers, head_layout, model_config, text_decoder
from .targets import Targets
from .tokens import pool_tokens

_CHECKPOINTING = "_gradient_checkpointing_func"  # a private name of transformers (5.5.4)


class Hooks(ABC):
    """Changes a model while the context is entered, or from :meth:`install` to :meth:`remove`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def install(self) -> None:
        """Hooks the model; a second call does nothing."""
        if not self._undo:
            self._hook()

    def remove(self) -> None:
        """Removes the hooks in reverse order."""
        while self._undo:
            self._undo.pop()()

    @abstractmethod
    def _hook(self) -> None:
        """Hooks the model, and appends to ``_undo`` the function that removes each hook."""

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute of a module until the hooks are removed."""
        had, before = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # other code has replaced it since; keep that
            if had:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        self._undo.append(undo)


class LayerHooks(Hooks):
    """Keeps rows of chosen decoder layers from the next forward pass, with gradient.

    A trainer may run the model a second time in a step, without a graph, to compute metrics. The rows of such a pass
    never replace those that carry gradient.

    Under gradient checkpointing, rows that are seen inside a layer carry no gradient. Therefore the checkpointing
    function of the chosen layers is wrapped, so that a layer returns the rows together with its output.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        targets.check(self._layout)
        self._targets = targets.items
        modules, final_norm = decoder_layers(model), text_decoder(model).norm
        self._layers: dict[int, Any] = {i: final_norm if i == FINAL else modules[i] for i in targets.layers}
        self._read: Callable[[Tensor], Tensor] | None = None  # turns tokens into rows; None captures nothing
        self._rows: dict[int, tuple[Tensor, ...]] = {}
        self._wrapped: dict[int, Callable[..., Any]] = {}
        #: The layers whose rows received a gradient since the forward pass, if :attr:`watch_gradients` is set.
        self.gradient_seen: set[int] = set()
        self.watch_gradients = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an inert copy: the hooks of a copied model (EMA, SWA) must call the modules of the copy alone."""
        inert = object.__new__(type(self))
        vars(inert).update(vars(self), _read=None, _rows={}, _undo=[], _layers={}, _wrapped={}, gradient_seen=set())
        return inert

    def remove(self) -> None:
        """Removes the hooks and drops the captured rows."""
        super().remove()
        self._read = None
        self._rows.clear()
        self._wrapped.clear()

    @abstractmethod
    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Calls ``original``, the checkpointing function of a layer, and keeps the layer's rows."""

    def pool(self, mask: Tensor | None) -> None:
        """Sets the tokens ``[B, T]`` over which the next forward pass averages; None captures nothing."""
        self._start_pass(None if mask is None else lambda hidden: pool_tokens(hidden, mask))

    def tokens(self, positions: Tensor) -> None:
        """Reads the next forward pass at the given token positions ``[B, n]`` of each row."""
        index = positions.unsqueeze(-1)
        self._start_pass(lambda hidden: hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])))

    def _start_pass(self, read: Callable[[Tensor], Tensor] | None) -> None:
        self._read = read
        self._rows.clear()
        self.gradient_seen.clear()
        if not self._undo:
            return
        # Done before every pass, because a trainer may enable checkpointing after the hooks were installed.
        for index, layer in self._layers.items():
            function = vars(layer).get(_CHECKPOINTING)
            if function is not None and function is not self._wrapped.get(index):
                # a partial instead of a closure, because deepcopy copies the parts of a partial
                self._wrapped[index] = partial(self._checkpointed, index, layer, function)
                self._replace(layer, _CHECKPOINTING, self._wrapped[index])

    def _check_captured(self) -> None:
        missing = [index for index in self._layers if index not in self._rows]
        if missing:
            raise RuntimeError(
                f"No forward pass through layers {missing} was captured: name the tokens (`capture.pool(mask)`), then "
                "call the model inside the context."
            )

    def _keep(self, index: int, *rows: Tensor) -> None:
        kept = self._rows.get(index)
        if kept is None or rows[0].requires_grad or not kept[0].requires_grad:
            self._rows[index] = rows

    def _watch(self, index: int, rows: Tensor) -> None:
        if self.watch_gradients and rows.requires_grad:
            rows.register_hook(lambda gradient: self._note_gradient(index, gradient))

    def _note_gradient(self, index: int, gradient: Tensor) -> None:
        if bool((gradient != 0).any()):
            self.gradient_seen.add(index)


def in_backward() -> bool:
    """Tells whether a backward pass is running; a forward call then recomputes an earlier one."""
    return torch._C._current_graph_task_id() != -1  # a private name of torch (2.11)
