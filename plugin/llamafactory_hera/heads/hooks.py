"""Removable hooks on a model, and hooks that capture representations from its decoder layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from .families import FINAL, decoder_layers, final_norm, head_layout, model_config, text_decoder
from .targets import Targets
from .tokens import pool_tokens

_CHECKPOINTING = "_gradient_checkpointing_func"  # a private name of transformers (5.5.4)


class Hooks(ABC):
    """Changes a model inside the context, or from ``install`` to ``remove``."""

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
                return  # keep a later replacement by other code
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)


class LayerHooks(Hooks):
    """Captures rows (one per sample or token) of chosen decoder layers in the next forward pass, with gradients."""

    def __init__(self, model: nn.Module, targets: Targets) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        targets.check(self._layout)
        self._targets = targets.items
        modules, decoder = decoder_layers(model), text_decoder(model)
        self._layers: dict[int, Any] = {i: final_norm(decoder) if i == FINAL else modules[i] for i in targets.layers}
        self._read: Callable[[Tensor], Tensor] | None = None  # maps tokens to rows; None captures nothing
        self._rows: dict[int, tuple[Tensor, ...]] = {}  # by layer; axis 0 indexes the layer's targets
        #: The layers whose rows have received a gradient since the forward pass, if ``watch_gradients`` is true.
        self.gradient_seen: set[int] = set()
        self.watch_gradients = False
        self._unwatched: set[int] = set()  # layers that compiled code has read; `_stacked` watches them

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an inert copy: hooks in a copied model (EMA, SWA) must call only the modules of that copy."""
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
        """Calls ``original``, the checkpointing function of a layer, and captures the layer's rows."""

    def pool(self, mask: Tensor | None) -> None:
        """Sets the tokens to average in the next pass, ``[B, T]`` or packed ``[N, B * T]``; None ends capturing."""
        self._start_pass(None if mask is None else lambda hidden: pool_tokens(hidden, mask))

    def tokens(self, positions: Tensor) -> None:
        """Sets the token positions ``[B, n]`` to capture in the next forward pass."""
        index = positions.unsqueeze(-1)
        self._start_pass(lambda hidden: hidden.gather(1, index.expand(-1, -1, hidden.shape[-1])))

    def representations(self) -> Tensor:
        """Returns the averages of the last pass, ``[n_targets, B, D]``; raises ``RuntimeError`` if it captured none.

        After ``tokens``, returns rows ``[n_targets, B, n, X]``: outputs of layers (X = D), or of heads before
        the output projection (X = ``head_dim``).
        """
        return self._stacked(0)

    def _start_pass(self, read: Callable[[Tensor], Tensor] | None) -> None:
        self._read = read
        self._rows.clear()
        self.gradient_seen.clear()
        if not self._undo:
            return
        # Repeated before every pass, because a trainer may enable checkpointing after the hooks were installed.
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
        while self._unwatched:
            index = self._unwatched.pop()
            self._watch(index, self._rows[index][0])
        rows = {index: iter(kept[part]) for index, kept in self._rows.items()}
        return torch.stack([next(rows[item.layer]) for item in self._targets])

    def _keep(self, index: int, *rows: Tensor) -> None:
        kept = self._rows.get(index)  # a trainer may run the model again, without a graph, to compute metrics
        if kept is None or rows[0].requires_grad or not kept[0].requires_grad:
            self._rows[index] = rows

    def _watch(self, index: int, rows: Tensor) -> None:
        def note(gradient: Tensor) -> None:
            if bool((gradient != 0).any()):
                self.gradient_seen.add(index)

        if torch.compiler.is_compiling():
            self._unwatched.add(index)  # a compiled graph cannot register the hook
        elif self.watch_gradients and rows.requires_grad:
            rows.register_hook(note)


def in_backward() -> bool:
    """Returns whether a backward pass is running; a forward call during it is a recomputation."""
    # a private name of torch (2.11), which torch.compile cannot trace
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
