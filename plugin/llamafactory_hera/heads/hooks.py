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
        before = vars(owner).get(name)
        setattr(owner, name, value)

        def undo() -> None:
            if vars(owner).get(name) is not value:
                return  # other code has replaced it since; keep that
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)


class LayerHooks(Hooks):
    """Keeps rows of chosen decoder layers from the next forward pass, with gradient.

    A trainer may run the model a second time in a step, without a graph, to compute metrics. The rows of such a pass
    never replace those that carry gradient.
    """

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        targets.check(self._layout)
        self._targets = targets.items
        modules, final_norm = decoder_layers(model), text_decoder(model).norm
        self._layers: dict[int, Any] = {i: final_norm if i == FINAL else modules[i] for i in targets.layers}
        self._read: Callable[[Tensor], Tensor] | None = None  # turns tokens into rows; None captures nothing
        self._rows: dict[int, tuple[Tensor, ...]] = {}  # each begins with the axis of a layer's targets
        #: The layers whose rows received a gradient since the forward pass, if :attr:`watch_gradients` is set.
        self.gradient_seen: set[int] = set()
        self.watch_gradients = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an inert copy: the hooks of a copied model (EMA, SWA) must call the modules of the copy alone."""
        inert = object.__new__(type(self))
        vars(inert).update(vars(self), _read=None, _rows={}, _undo=[], _layers={}, gradient_seen=set())
        return inert

    def remove(self) -> None:
        """Removes the hooks and drops the captured rows."""
        super().remove()
        self._read = None
        self._rows.clear()

    @abstractmethod
    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        """Calls ``original``, the checkpointing function of a layer, and keeps the layer's rows."""

    def pool(self, mask: Tensor | None) -> None:
        """Sets the tokens ``[B, T]`` over which the next forward pass averages; None captures nothing."""
        self._start_pass(None if mask is None else lambda hidden: pool_tokens(hidden, mask))

    def tokens(self, positions: Tensor) -> None:
        """Sets the token positions ``[B, n]`` at which the next forward pass is read."""
        index = positions.unsqueeze(-1)
        self._start_pass(lambda hidden: hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])))

    def representations(self) -> Tensor:
        """Returns the rows of the last forward pass in the order of the targets; ``RuntimeError`` without a pass.

        Returns:
            Averages ``[n_targets, B, D]``. After :meth:`tokens`, ``[n_targets, B, n, X]``: outputs of layers (X = D),
            or of heads before their output projection (X = ``head_dim``).
        """
        return self._stacked(0)

    def _start_pass(self, read: Callable[[Tensor], Tensor] | None) -> None:
        self._read = read
        self._rows.clear()
        self.gradient_seen.clear()
        if not self._undo:
            return
        # Done before every pass, because a trainer may enable checkpointing after the hooks were installed.
        for index, layer in self._layers.items():
            function = vars(layer).get(_CHECKPOINTING)
            if function is not None and getattr(function, "func", None) != self._checkpointed:
                # a partial instead of a closure, because deepcopy copies the parts of a partial
                self._replace(layer, _CHECKPOINTING, partial(self._checkpointed, index, layer, function))

    def _stacked(self, part: int) -> Tensor:
        missing = [index for index in self._layers if index not in self._rows]
        if missing:
            raise RuntimeError(
                f"No pass through layers {missing} was captured; call pool(mask), then the model, inside the context."
            )
        rows = {index: iter(kept[part]) for index, kept in self._rows.items()}
        return torch.stack([next(rows[item.layer]) for item in self._targets])

    def _keep(self, index: int, *rows: Tensor) -> None:
        kept = self._rows.get(index)
        if kept is None or rows[0].requires_grad or not kept[0].requires_grad:
            self._rows[index] = rows

    def _watch(self, index: int, rows: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            if bool((gradient != 0).any()):
                self.gradient_seen.add(index)

        if self.watch_gradients and rows.requires_grad:
            rows.register_hook(note)


def in_backward() -> bool:
    """Tells whether a backward pass is running; a forward call then recomputes an earlier one."""
    return torch._C._current_graph_task_id() != -1  # a private name of torch (2.11)
