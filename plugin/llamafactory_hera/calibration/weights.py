"""The value and output weights of single heads: read, changed in place, and saved as a PEFT adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..files import read_json, write_json, write_safetensors
from ..heads.families import attention_module, decoder_layers, head_layout, model_config, output_projection
from ..heads.targets import Target

#: The value rows of a key-value head, or the output columns of a query head.
Slice = Literal["value", "output"]
SLICES: tuple[Slice, ...] = get_args(Slice)

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Edit:
    """The low-rank update ``left @ right`` of one slice, in fp32 and without its step size."""

    layer: int
    kind: Slice
    index: int  # of the key-value head, or of the query head
    left: Tensor  # [m, r]
    right: Tensor  # [r, n]


@dataclass(frozen=True)
class Update:
    """Edits that share one step size; there are none if the heads already equal their anchors."""

    heads: tuple[Target, ...]
    edits: tuple[Edit, ...]


#: An update with its step size, alpha in eq. 14.
Scaled = tuple[Update, float]


class HeadWeights:
    """The weights of a model, sliced by head; all slices are views.

    ``v_proj`` has a block of rows for each key-value head, and ``o_proj`` has a block of columns for each query head.
    Under grouped-query attention, a group of query heads shares a block of ``v_proj``.

    Raises:
        ValueError: A value or output projection is fused, quantized, wrapped, or not laid out by heads.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = head_layout(model_config(model))
        self.group_size = self.layout.n_heads // self.layout.n_kv_heads
        names = {module: name for name, module in model.named_modules()}
        self.projections: dict[tuple[int, Slice], nn.Linear] = {}
        self.names: dict[tuple[int, Slice], str] = {}
        for layer, module in enumerate(decoder_layers(model)):
            value = getattr(attention_module(module), "v_proj", None)
            output = output_projection(module)
            for kind, projection in zip(SLICES, (value, output), strict=True):
                self.projections[layer, kind] = self._checked(projection, kind)
                self.names[layer, kind] = names[self.projections[layer, kind]]

    def index(self, head: Target, kind: Slice) -> int:
        """Returns the number of a query head's block in a projection; in ``v_proj`` that is its key-value head."""
        assert head.head is not None
        return head.head // self.group_size if kind == "value" else head.head

    def group(self, head: Target) -> tuple[Target, ...]:
        """Lists the query heads that share a head's value block, including the head."""
        first = self.index(head, "value") * self.group_size
        return tuple(Target(head.layer, first + offset) for offset in range(self.group_size))

    def block(self, index: int) -> slice:
        """Returns the rows of a value projection, or the columns of an output projection, that form a block."""
        return slice(index * self.layout.head_dim, (index + 1) * self.layout.head_dim)

    def slice(self, layer: int, kind: Slice, index: int) -> Tensor:
        """Returns a block: ``[d, D]`` of a value projection, or ``[D, d]`` of an output projection."""
        weight = self.projections[layer, kind].weight.detach()
        return weight[self.block(index)] if kind == "value" else weight[:, self.block(index)]

    def of_head(self, head: Target, kind: Slice) -> Tensor:
        """Returns the slice of a query head."""
        return self.slice(head.layer, kind, self.index(head, kind))

    def _checked(self, module: nn.Module | None, kind: Slice) -> nn.Linear:
        layout, dtype = self.layout, getattr(getattr(module, "weight", None), "dtype", None)
        if module is not None and not (isinstance(module, nn.Linear) and dtype in _FLOATS):
            raise ValueError(
                f"model: a projection is a {type(module).__module__}.{type(module).__name__} of {dtype}, hence "
                "quantized or wrapped; calibrate the base model without quantization (the adapter also fits the "
                "quantized model), or dequantize the checkpoint."
            )
        if module is None or (kind == "value" and len(module.weight) != layout.n_kv_heads * layout.head_dim):
            raise ValueError(
                f"model: layers of type {layout.model_type!r} have no v_proj with {layout.n_kv_heads} key-value heads "
                f"of size {layout.head_dim}; use a model whose projections are not fused."
            )
        return module


@contextmanager
def applied(weights: HeadWeights, steps: Sequence[Scaled]) -> Iterator[None]:
    """Changes the weights in place to ``W + alpha * left @ right`` (eq. 14), and restores them bit by bit."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for edit, alpha in ((edit, alpha) for update, alpha in steps for edit in update.edits):
            view = weights.slice(edit.layer, edit.kind, edit.index)
            saved.append((view, view.clone()))
            view.copy_(view.float() + alpha * (edit.left @ edit.right))
        yield
    finally:
        for view, original in reversed(saved):
            view.copy_(original)


def save_adapter(folder: Path, weights: HeadWeights, steps: Sequence[Scaled], base_model: str) -> None:
    """Writes a PEFT LoRA adapter with a rank for each projection.

    The step sizes are multiplied into the factors, and the scaling of the adapter is 1.
    """
    from peft import LoraConfig, TaskType

    factors = _lora_factors(weights, steps)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    largest = max(ranks.values())
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
        target_modules=list(ranks),
        **{"r": largest, "lora_alpha": largest, "rank_pattern": ranks, "alpha_pattern": ranks},
    )
    config.save_pretrained(str(folder))
    # PEFT stores target_modules as a set, whose order changes from process to process
    content = read_json(folder / ADAPTER_CONFIG)
    content["target_modules"].sort()
    write_json(folder / ADAPTER_CONFIG, content)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor
        for name, both in factors.items()
        for side, factor in zip("AB", both, strict=True)
    }
    write_safetensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})


def _lora_factors(weights: HeadWeights, steps: Sequence[Scaled]) -> dict[str, tuple[Tensor, Tensor]]:
    """Maps the name of each changed projection to its ``lora_A`` ``[R, in]`` and ``lora_B`` ``[out, R]``.

    The factors of several heads are concatenated, each padded with zeros outside of its block, so that ``R`` is the
    sum of their ranks.
    """
    found: dict[tuple[int, Slice], list[tuple[Tensor, Tensor]]] = {}
    for update, alpha in steps:
        for edit in update.edits:
            key, rank, block = (edit.layer, edit.kind), edit.left.shape[1], weights.block(edit.index)
            n_out, n_in = weights.projections[key].weight.shape
            a, b = torch.zeros(rank, n_in), torch.zeros(n_out, rank)
            a[:, block if edit.kind == "output" else slice(None)] = edit.right.cpu()
            b[block if edit.kind == "value" else slice(None)] = alpha * edit.left.cpu()
            found.setdefault(key, []).append((a, b))
    return {
        weights.names[key]: (torch.cat([a for a, _ in edits]), torch.cat([b for _, b in edits], dim=1))
        for key, edits in sorted(found.items())
    }
