"""Reads the contributions of chosen heads, or the outputs of chosen layers, from a forward pass, with gradients.

A head's contribution to the residual stream is ``W_O[:, h*d:(h+1)*d] @ o`` (paper, eq. 7), averaged over tokens. The
projection is linear, so the averages can be computed first and projected by the model's own module: for each head, a
row that is zero outside the head's columns is appended to the module's input as a token, and its output is split off.
This is correct for LoRA, DoRA, 4-bit weights, and parameters sharded by ZeRO-3 or FSDP. In most of these cases,
slicing the weight would fail or give wrong results.

Under gradient checkpointing, the captured rows receive gradients only if the checkpointed function *returns* them, so
the checkpointing function of the chosen layers is wrapped.

For single tokens, the capture keeps a head's ``head_dim`` values per token instead of D, and reads the head's
projection matrix once, by projecting unit vectors.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import output_projection
from .hooks import LayerHooks, in_backward
from .targets import Target, Targets

# The relative error that `_verify` tolerates; 8-bit weights and activations cause a few percent.
_TOLERANCE = 0.1


class HeadCapture(LayerHooks):
    """Captures the contributions of chosen heads, averaged or at single tokens, inside its context.

    Set the tokens before the forward pass. A capture works under gradient checkpointing and with every engine:

        with HeadCapture(model, "L3H4,L7H6") as capture:
            capture.pool(batch["labels"] != -100)
            loss = model(**batch).loss
            z = capture.representations()
            (loss + term(z)).backward()

    Stay inside the context until the backward pass has ended, because gradient checkpointing reruns the layers.

    Args:
        model: A transformers model, bare or wrapped by PEFT, DDP, FSDP or DeepSpeed.
        heads: ``Targets`` of heads, their names in a string (``"L3H4,L7H6"``) or a list, or the path of a file.

    Raises:
        ValueError: The model lacks one of the heads.
    """

    def __init__(self, model: nn.Module, heads: Targets | str | Iterable[Target | str]) -> None:
        super().__init__(model, Targets.parse(heads))
        self._heads_of: dict[int, list[int]] = {index: [] for index in self._layers}
        for item in self._targets:
            self._heads_of[item.layer].append(item.head or 0)
        self._frames: dict[int, list[tuple[Tensor, ...]]] = {}  # rows of the checkpointed layers that are running
        self._unverified = set(self._layers)

    def projections(self) -> Tensor:
        """Returns each head's part of the output projection, ``[n_heads, head_dim, D]``, after ``tokens``."""
        return self._stacked(1)

    def _hook(self) -> None:
        # A checkpointed layer changes `_frames`. Without this setting, torch.compile would break its graph there.
        if hasattr(torch._dynamo.config, setting := "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            patched = torch._dynamo.config.patch({setting: True})
            patched.__enter__()
            self._undo.append(partial(patched.__exit__, None, None, None))
        for index, layer in self._layers.items():
            projection = output_projection(layer, self._layout.layers[index])
            # a partial instead of a closure, because deepcopy copies the parts of a partial
            self._replace(projection, "forward", partial(self._project, index, projection, projection.forward))

    def _project(
        self, index: int, projection: nn.Module, original: Callable[..., Tensor], hidden: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        if self._read is None:
            return original(hidden, *args, **kw)
        read = self._read(hidden)
        self._watch(index, read)
        # The bias may belong to the module, to the layer inside an adapter, or to the adapter. A row of zeros is
        # projected to this bias, which is then subtracted from the other rows.
        biased = any(getattr(module, "bias", None) is not None for module in projection.modules())
        added = self._head_rows(index, read)
        # The added rows are spread evenly over the batch, because packing changes the number of samples per row.
        size, batch = len(added), len(hidden)
        added = nn.functional.pad(added, (0, 0, 0, -(size + biased) % batch + biased)).unflatten(0, (batch, -1))
        output = original(torch.cat([hidden, added], dim=1), *args, **kw)
        if index in self._unverified and not in_backward() and not torch.compiler.is_compiling():
            self._verify(index, projection, original, read, output[:, : hidden.shape[1]])
        # cloned, because a view would keep the output of all tokens alive
        projected = output[:, hidden.shape[1] :].clone().flatten(0, 1)
        projected = projected[:size] - projected[size : size + 1] if biased else projected[:size]
        chosen = self._heads_of[index]
        if read.dim() == 3:
            heads = read.unflatten(-1, (-1, self._layout.layers[index].head_dim))  # [B, t, H, d]
            outputs = torch.stack([heads[:, :, head] for head in chosen])
            rows: tuple[Tensor, ...] = (outputs, projected.unflatten(0, (len(chosen), -1)))
        else:
            rows = (projected.unflatten(0, (-1, len(chosen))).transpose(0, 1),)
        if index in self._frames:
            self._frames[index].append(rows)
        elif not in_backward():
            self._keep(index, *rows)
        return output[:, : hidden.shape[1]]

    @torch.no_grad()  # a recomputation skips this check, and would lack the tensors that autograd saved
    def _verify(
        self, index: int, projection: nn.Module, project: Callable[..., Tensor], read: Tensor, output: Tensor
    ) -> None:
        """Raises ``ValueError`` unless the contributions of all heads add up to one row of the projection's output."""
        dropouts = (module for module in projection.modules() if isinstance(module, nn.Dropout))
        inputs, layer = read.flatten(0, -2)[:1], self._layout.layers[index]
        if not inputs.any() or any(module.training and module.p for module in dropouts):
            return  # a later pass will verify this layer
        self._unverified.discard(index)
        assert self._read is not None
        heads = torch.block_diag(*inputs[0].split(layer.head_dim))  # one row per head
        *outputs, bias = project(nn.functional.pad(heads, (0, 0, 0, 1)).unsqueeze(0))[0].float()
        contributions = torch.stack(outputs) - bias
        expected = self._read(output).flatten(0, -2)[0].float() - bias
        error = (contributions.sum(0) - expected).norm() / contributions.norm()
        if error > _TOLERANCE:
            raise ValueError(
                f"model: L{index} is {layer}, but their contributions do not add up to the output of "
                f"{layer.projection} ({error:.0%} off), so HeRA cannot read them; use another model, or hera_layers."
            )

    def _head_rows(self, index: int, read: Tensor) -> Tensor:
        """Returns the rows to append, each zero outside the columns of its head.

        They contain the averages, ``[N*n, H*d]``, or, for single tokens, unit vectors of the heads, ``[n*d, H*d]``.
        """
        width, single, rows = self._layout.layers[index].head_dim, read.dim() == 3, []
        for first in (head * width for head in self._heads_of[index]):
            end = first + width
            values = torch.eye(width, dtype=read.dtype, device=read.device) if single else read[:, first:end]
            rows.append(nn.functional.pad(values, (first, read.shape[-1] - end)))
        return torch.cat(rows) if single else torch.stack(rows, dim=1).flatten(0, 1)

    def _checkpointed(self, index: int, layer: nn.Module, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        function, rest, read, n_rows = args[0], args[1:], self._read, 1
        if read is None:
            return original(function, *rest, **kw)

        def run(*run_args: Any, **run_kwargs: Any) -> tuple:
            # This function runs again in the backward pass. By then, other tokens may have been set.
            outer, self._read, self._frames[index] = self._read, read, []
            try:
                output = function(*run_args, **run_kwargs)
            finally:
                self._read, rows = outer, self._frames.pop(index)
            if not rows:
                raise RuntimeError(
                    "HeadCapture was left before the backward pass, but gradient checkpointing reruns the layers in "
                    "that pass; stay inside the context until `loss.backward()` has returned."
                )
            nonlocal n_rows
            n_rows = len(rows[0])
            return (*output, *rows[0]) if isinstance(output, tuple) else (output, *rows[0])

        run.__self__ = layer  # type: ignore[attr-defined]  # some hosts' checkpointing functions read it
        together = original(run, *rest, **kw)
        output, rows = together[:-n_rows], together[-n_rows:]
        self._keep(index, *rows)
        return output[0] if len(output) == 1 else tuple(output)


class LayerCapture(LayerHooks):
    """Captures the outputs of decoder layers, such as ``"L14,L15"``, in the same way as ``HeadCapture``."""

    def __init__(self, model: nn.Module, layers: Targets | str | Iterable[Target | str]) -> None:
        super().__init__(model, Targets.parse(layers, "layer"))
        self._inside: set[int] = set()  # the checkpointed layers that are running

    def _hook(self) -> None:
        for index, layer in self._layers.items():
            # no forward hook, because a model that is already compiled would ignore it
            self._replace(layer, "forward", partial(self._run, index, layer.forward))

    def _run(self, index: int, original: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        output = original(*args, **kw)
        if index not in self._inside and not in_backward():
            self._read_output(index, output)
        return output

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
        self._keep(index, rows.unsqueeze(0))
