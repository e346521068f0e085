"""Reading the contributions of chosen heads, or the outputs of chosen layers, from a forward pass, with gradient.

A head's contribution to the residual stream is ``W_O[:, h*d:(h+1)*d] @ o`` (paper, eq. 7), averaged over tokens. The
projection is linear, so the pooled head output is projected once. The output projection itself does that: while a
mask is set, the pooled rows, each zero outside its head, are appended to the token axis of the module's input and
split off its output. So the result is right whatever the module has become (LoRA, DoRA, 4-bit weights, parameters
sharded by ZeRO-3 or FSDP), because the module projects; slicing its weight would be wrong or fail for most of these.

Under gradient checkpointing the rows must be *returned* from the checkpointed function to carry gradient; the
checkpointing function of the chosen layers is wrapped for that. A layer's output is read from what that function
returns, and otherwise by a forward hook.

At single tokens a head's contribution has D values, and there are hundreds of tokens. There the head's output before
the projection is kept, and the projection itself is asked for the images of the head's unit vectors.
"""

from collections.abc import Callable, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .families import output_projection
from .hooks import LayerHooks, in_backward
from .targets import Target, Targets


class HeadCapture(LayerHooks):
    """Captures the contributions of chosen heads, pooled or at tokens, while it is entered.

    The tokens are named before the forward pass; it works under gradient checkpointing and every sharding engine::

        with HeadCapture(model, "L3H4,L7H6") as capture:
            capture.pool(batch["labels"] != -100)
            loss = model(**batch).loss
            z = capture.representations()
            (loss + term(z)).backward()

    Keep it entered until after the backward pass: gradient checkpointing runs the layers again there.

    Args:
        model: A transformers model, bare or wrapped by PEFT, DDP, FSDP or DeepSpeed.
        heads: ``Targets`` of heads, or their names: ``"L3H4,L7H6"``, or one by one, or the path of a heads.json.

    Raises:
        ValueError: Unknown architecture, or a head outside the model.
    """

    def __init__(self, model: nn.Module, heads: Targets | str | Iterable[Target | str]) -> None:
        super().__init__(model, Targets.parse(heads))
        self._heads_of: dict[int, list[int]] = {index: [] for index in self._layers}
        for item in self._targets:
            self._heads_of[item.layer].append(item.head or 0)
        self._frames: dict[int, list[tuple[Tensor, ...]]] = {}  # rows on their way out of a checkpointed layer
        self._selectors: dict[int, Tensor] = {}

    def representations(self) -> Tensor:
        """The pooled contributions of the last forward pass, or the heads' outputs at its tokens.

        Returns:
            ``[n_heads, B, D]``, or after :meth:`tokens` ``[n_heads, B, n, head_dim]``: what :meth:`projections`
            takes into the residual stream; heads in the order in which they were given.

        Raises:
            RuntimeError: No forward pass was captured.
        """
        return self._of_heads(0)

    def projections(self) -> Tensor:
        """After a pass at tokens, the part of the output projection that is each head's, ``[n_heads, head_dim, D]``.

        It carries gradient, and is what the module itself computes, under adapters and sharding, too.
        """
        return self._of_heads(1)

    def _of_heads(self, part: int) -> Tensor:
        self._check_captured()
        rows = {index: iter(kept[part].unbind(1 - part)) for index, kept in self._rows.items()}
        return torch.stack([next(rows[item.layer]) for item in self._targets])

    def _hook(self) -> None:
        projections = {i: output_projection(layer) for i, layer in self._layers.items()}
        readers = [getattr(getattr(p.forward, "func", None), "__self__", None) for p in projections.values()]
        if any(isinstance(reader, HeadCapture) and reader._undo for reader in readers):
            raise RuntimeError(
                f"HeadCapture: heads of layers {list(self._layers)} are captured already, by another HeadCapture; "
                "leave that one first (`capture.remove()`)."
            )
        for index, projection in projections.items():
            # a partial, not a closure: its parts are copied with the model
            self._replace(projection, "forward", partial(self._project, index, projection, projection.forward))

    def _project(
        self, index: int, projection: nn.Module, original: Callable[..., Tensor], hidden: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        if self._read is None:
            return original(hidden, *args, **kw)
        read = self._read(hidden)
        self._watch(index, read)
        # a bias of its own, of the layer inside an adapter, or of the adapter: the image of a zero row
        biased = any(getattr(module, "bias", None) is not None for module in projection.modules())
        at_tokens = read.dim() == 3
        added = self._unit_rows(index, hidden, biased) if at_tokens else self._head_rows(index, read, biased)
        output = original(torch.cat([hidden, added], dim=1), *args, **kw)
        # a copy: a view would keep the layer's whole output alive for as long as the rows
        images = output[:, hidden.shape[1] :].clone()
        n = len(self._heads_of[index])
        if at_tokens:
            size = n * self._layout.head_dim
            images = images.flatten(0, 1)
            images = images[:size] - images[size : size + 1] if biased else images[:size]
            rows: tuple[Tensor, ...] = (self._head_outputs(index, read), images.unflatten(0, (n, -1)))
        else:
            rows = (images[:, :n] - images[:, n:] if biased else images,)
        if index in self._frames:
            self._frames[index].append(rows)
        elif not in_backward():
            self._keep(index, *rows)
        return output[:, : hidden.shape[1]]

    def _head_outputs(self, index: int, read: Tensor) -> Tensor:
        """The chosen heads of ``[B, t, H*d]``, as ``[B, n, t, d]``."""
        heads = read.unflatten(-1, (-1, self._layout.head_dim))
        return torch.stack([heads[:, :, head] for head in self._heads_of[index]], dim=1)

    def _head_rows(self, index: int, pooled: Tensor, biased: bool) -> Tensor:
        """Pooled head outputs ``[B, H*d]`` as projection inputs ``[B, n, H*d]``, each zero outside its head."""
        rows = pooled.unsqueeze(1) * self._selector(index, pooled)
        return nn.functional.pad(rows, (0, 0, 0, 1)) if biased else rows

    def _unit_rows(self, index: int, hidden: Tensor, biased: bool) -> Tensor:
        """The unit vectors of the chosen heads as projection inputs, spread over the batch: ``[B, r, H*d]``."""
        width, batch = self._layout.head_dim, hidden.shape[0]
        units = torch.eye(width, dtype=hidden.dtype, device=hidden.device).repeat(1, self._layout.n_heads)
        rows = (self._selector(index, hidden).unsqueeze(1) * units).flatten(0, 1)  # [n*d, H*d]
        missing = -(len(rows) + biased) % batch + biased
        return nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(0, (batch, -1))

    def _selector(self, index: int, like: Tensor) -> Tensor:
        """One for each value of a chosen head, ``[n, H*d]``."""
        selector = self._selectors.get(index)  # kept: making it anew copies indices to the device in every pass
        if selector is None or (selector.device, selector.dtype) != (like.device, like.dtype):
            with torch.inference_mode(False):
                chosen = nn.functional.one_hot(torch.tensor(self._heads_of[index]), self._layout.n_heads)
                selector = chosen.repeat_interleave(self._layout.head_dim, dim=1).to(like)
            self._selectors[index] = selector
        return selector

    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        function, rest, read, n_rows = args[0], args[1:], self._read, 1
        if read is None:
            return original(function, *rest, **kw)

        def run(_: nn.Module, *run_args: Any, **run_kwargs: Any) -> tuple:
            # runs again in the backward pass, when other tokens may be named
            outer, self._read, self._frames[index] = self._read, read, []
            try:
                output = function(*run_args, **run_kwargs)
            finally:
                self._read, rows = outer, self._frames.pop(index)
            if not rows:
                raise RuntimeError(
                    "HeadCapture was left before the backward pass, where gradient checkpointing runs the layers "
                    "again: keep it entered until after `loss.backward()`."
                )
            nonlocal n_rows
            n_rows = len(rows[0])
            return (*output, *rows[0]) if isinstance(output, tuple) else (output, *rows[0])

        # the host's checkpointing function finds the layer as the `__self__` of what it is given
        together = original(MethodType(run, layer), *rest, **kw)
        output, rows = together[:-n_rows], together[-n_rows:]
        self._keep(index, *rows)
        return output[0] if len(output) == 1 else tuple(output)


class LayerCapture(LayerHooks):
    """Captures the outputs of chosen decoder layers while it is entered::

        with LayerCapture(model, "L14,L15") as capture:
            capture.pool(mask)
            loss = model(**batch).loss
            z = capture.representations()

    Args:
        model: A transformers model, bare or wrapped by PEFT, DDP, FSDP or DeepSpeed.
        layers: ``Targets`` of layers, or their names: ``"L14,L15"``, or one by one, or the path of a layers.json.

    Raises:
        ValueError: Unknown architecture, or a layer outside the model.
    """

    def __init__(self, model: nn.Module, layers: Targets | str | Iterable[Target | str]) -> None:
        super().__init__(model, Targets.parse(layers, "layer"))
        self._inside: set[int] = set()  # layers whose checkpointed function is running

    def representations(self) -> Tensor:
        """What the last forward pass gave.

        Returns:
            ``[n_layers, B, D]`` of averages, ``[n_layers, B, n, D]`` of tokens; layers in the order given.

        Raises:
            RuntimeError: No forward pass was captured.
        """
        self._check_captured()
        return torch.stack([self._rows[item.layer][0] for item in self._targets])

    def _hook(self) -> None:
        for index, layer in self._layers.items():
            self._undo.append(layer.register_forward_hook(partial(self._after, index)).remove)

    def _after(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        if index not in self._inside and not in_backward():
            self._read_output(index, output)

    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        self._inside.add(index)
        try:
            output = original(*args, **kw)
        finally:
            self._inside.discard(index)
        self._read_output(index, output)
        return output

    def _read_output(self, index: int, output: Any) -> None:
        if self._read is None:
            return
        rows = self._read(output[0] if isinstance(output, tuple) else output)
        self._watch(index, rows)
        self._keep(index, rows)
