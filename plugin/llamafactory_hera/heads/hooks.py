"""What every reader of a model shares: hooks that can be removed, and rows that leave checkpointed layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from .families import FINAL, decoder_layers, final_norm, head_layout, model_config
from .targets import Targets
from .tokens import pool_tokens

_CHECKPOINTING = "_gradient_checkpointing_func"


class Hooks(ABC):
    """Changes to a model that last while they are entered, or from :meth:`install` to :meth:`remove`."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def install(self) -> None:
        """Hooks the model, once."""
        if not self._undo:
            self._hook()

    def remove(self) -> None:
        """Takes every hook away, the last one first."""
        while self._undo:
            self._undo.pop()()

    @abstractmethod
    def _hook(self) -> None:
        """Hooks the model; what takes a hook back goes to ``_undo``."""

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        had, before = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # replaced since by someone else, whose it is now
            if had:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

        self._undo.append(undo)


class LayerHooks(Hooks):
    """Hooks on chosen decoder layers that keep rows of the next forward pass, with gradient.

    A trainer may run the model once more in the same step without a graph, for metrics: that pass changes nothing.

    Under gradient checkpointing what is seen inside a layer carries no gradient of its own: the checkpointing function
    of the layers is wrapped, so that rows leave the layer with it.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        targets.check(self._layout)
        self._targets = targets.items
        modules = decoder_layers(model)
        self._layers = {index: final_norm(model) if index == FINAL else modules[index] for index in targets.layers}
        self._read: Callable[[Tensor], Tensor] | None = None  # from tokens to rows; None captures nothing
        self._rows: dict[int, tuple[Tensor, ...]] = {}
        self._wrapped: dict[int, Callable[..., Any]] = {}
        #: Layers whose rows received a gradient since the pass was started, when asked to watch.
        self.gradient_seen: set[int] = set()
        self.watch_gradients = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """What the hooks of a model's copy (EMA, SWA) lead to: it reads nothing, so that they call the copy's own."""
        inert = object.__new__(type(self))
        vars(inert).update(vars(self), _read=None, _rows={}, _undo=[], _layers={}, _wrapped={}, gradient_seen=set())
        return inert

    def remove(self) -> None:
        """Takes every hook away and forgets what was captured."""
        super().remove()
        self._read = None
        self._rows.clear()
        self._wrapped.clear()

    @abstractmethod
    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Calls the checkpointing function of a layer, its ``original``, and keeps the layer's rows."""

    def pool(self, mask: Tensor | None) -> None:
        """Sets the tokens over which the next forward pass averages, ``[B, T]``; None captures nothing."""
        self._start_pass(None if mask is None else lambda hidden: pool_tokens(hidden, mask))

    def tokens(self, positions: Tensor) -> None:
        """Takes the next forward pass at the given token positions of each row, ``[B, n]``."""
        index = positions.unsqueeze(-1)
        self._start_pass(lambda hidden: hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])))

    def _start_pass(self, read: Callable[[Tensor], Tensor] | None) -> None:
        self._read = read
        self._rows.clear()
        self.gradient_seen.clear()
        if not self._undo:
            return
        # before every pass: a trainer sets up checkpointing when it starts, after the hooks may have been installed
        for index, layer in self._layers.items():
            function = vars(layer).get(_CHECKPOINTING)
            if function is not None and function is not self._wrapped.get(index):
                # a partial, not a closure: its parts are copied with the model
                self._wrapped[index] = partial(self._checkpointed, index, layer, function)
                self._replace(layer, _CHECKPOINTING, self._wrapped[index])

    def _check_captured(self) -> None:
        missing = [index for index in self._layers if index not in self._rows]
        if missing:
            raise RuntimeError(
                f"No forward pass through layers {missing} was captured: call the model inside the context, after "
                "the tokens have been named (`capture.pool(mask)`)."
            )

    def _keep(self, index: int, *rows: Tensor) -> None:
        """Keeps a layer's rows; those of a pass without a graph never take the place of those that have one."""
        if rows[0].requires_grad or index not in self._rows or not self._rows[index][0].requires_grad:
            self._rows[index] = rows

    def _watch(self, index: int, rows: Tensor) -> None:
        if self.watch_gradients and rows.requires_grad:
            rows.register_hook(lambda gradient: self._note_gradient(index, gradient))

    def _note_gradient(self, index: int, gradient: Tensor) -> None:
        if bool((gradient != 0).any()):
            self.gradient_seen.add(index)


def in_backward() -> bool:
    """Whether a backward pass is running: a forward call then is the recomputation of an earlier one."""
    return torch._C._current_graph_task_id() != -1
