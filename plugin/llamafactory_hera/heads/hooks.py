"""What every reader of a model shares: hooks that can be removed, and rows that leave checkpointed layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families import FINAL, decoder_layers, final_norm, head_layout, model_config, text_decoder
from .pooling import pool_tokens
from .targets import Targets

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


class DecoderInputs(Hooks):
    """Changes what the text decoder gets in the next forward pass: its attention mask, and embeddings of tokens.

    It lies outside of checkpointed layers and inside of every wrapper, so that recomputation sees the same. While
    nothing is set nothing changes.

    Args:
        model: A transformers model, bare or wrapped.
        two_way: In every pass without a mask of its own the tokens of an image see one another in both directions:
            JARVIS's attention. Enter it around the evaluation, or ``generate``, of a model that was trained so.
    """

    def __init__(self, model: nn.Module, two_way: bool = False) -> None:
        super().__init__()
        self._decoder = text_decoder(model)
        self._model = next(m for m in model.modules() if isinstance(m, PreTrainedModel)) if two_way else None
        self._image_token = model_config(model).image_token_id if two_way else -1
        self._attention: Tensor | None = None
        self._two_way: Tensor | None = None
        self._embeddings: tuple[Tensor, Tensor] | None = None

    def set(self, attention: Tensor | None = None, embeddings: tuple[Tensor, Tensor] | None = None) -> None:
        """Sets both as :class:`~..objectives.base.Plan` describes them; None leaves one as it is."""
        self._attention, self._embeddings = attention, embeddings

    def _hook(self) -> None:
        self._undo.append(self._decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        if self._model is not None:
            self._undo.append(self._model.register_forward_pre_hook(self._look, with_kwargs=True).remove)

    def _look(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        self._two_way = None
        if ids is None or ids.shape[1] == 1:  # a token that is generated sees everything
            return
        visual, at = ids == self._image_token, torch.arange(ids.shape[1], device=ids.device)
        sees = (at.unsqueeze(1) >= at) | (visual.unsqueeze(2) & visual.unsqueeze(1))
        self._two_way = sees if mask is None else sees & mask.bool().unsqueeze(1)

    def _before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        attention = self._two_way if self._attention is None else self._attention
        if attention is None and self._embeddings is None:
            return None
        embeds = kwargs["inputs_embeds"]
        if self._embeddings is not None:
            positions, vector = self._embeddings
            if vector.shape != embeds.shape[-1:]:
                raise ValueError(f"A plan's embedding has the shape {list(vector.shape)}, not [{embeds.shape[-1]}].")
            # a row of its own takes what is no position, so that shapes do not depend on values
            padded = nn.functional.pad(embeds, (0, 0, 0, 1))
            index = torch.where(positions < 0, embeds.shape[1], positions).unsqueeze(-1).expand(-1, -1, len(vector))
            embeds = padded.scatter(1, index, vector.to(embeds).expand(index.shape))[:, :-1]
            kwargs = kwargs | {"inputs_embeds": embeds}
        if attention is not None:
            # the smallest number, not -inf: a row of padding that sees nothing must stay finite
            closed = torch.zeros_like(attention, dtype=embeds.dtype)
            closed = closed.masked_fill_(~attention, torch.finfo(embeds.dtype).min)
            kwargs = kwargs | {"attention_mask": closed.unsqueeze(1)}
        return args, kwargs


def in_backward() -> bool:
    """Whether a backward pass is running: a forward call then is the recomputation of an earlier one."""
    return torch._C._current_graph_task_id() != -1
