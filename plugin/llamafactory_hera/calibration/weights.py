"""The weight slices of single heads: whose they are, how they change in place, and their updates as a PEFT adapter."""

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
    """The update of one slice, of a key-value or of a query head, without its step size: ``left @ right`` in fp32."""

    layer: int
    kind: Slice
    index: int
    left: Tensor  # [m, r]
    right: Tensor  # [r, n]


@dataclass(frozen=True)
class Update:
    """What is changed together, under one step size; without an edit target and anchors are equal."""

    heads: tuple[Target, ...]
    edits: tuple[Edit, ...]


#: An update with its step size, alpha of eq. 14.
Scaled = tuple[Update, float]


class HeadWeights:
    """Views of the weights of a model, bare and whole on this process, by head; refuses what it cannot slice.

    ``v_proj`` holds a block of rows for each key-value head, which a group of query heads shares; ``o_proj`` a block
    of columns for each query head.
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
        """Which block of a projection serves a query head: its key-value head's, or its own."""
        assert head.head is not None
        return head.head // self.group_size if kind == "value" else head.head

    def group(self, head: Target) -> tuple[Target, ...]:
        """All query heads that share a head's value block, itself included."""
        first = self.index(head, "value") * self.group_size
        return tuple(Target(head.layer, first + offset) for offset in range(self.group_size))

    def block(self, index: int) -> slice:
        """The rows of a value projection, or the columns of an output projection, that a block takes."""
        return slice(index * self.layout.head_dim, (index + 1) * self.layout.head_dim)

    def slice(self, layer: int, kind: Slice, index: int) -> Tensor:
        """The weights themselves: ``[d, D]`` of a key-value head's value, ``[D, d]`` of a query head's output."""
        weight = self.projections[layer, kind].weight.detach()
        return weight[self.block(index)] if kind == "value" else weight[:, self.block(index)]

    def of_head(self, head: Target, kind: Slice) -> Tensor:
        """The slice of a query head; its value slice is that of its key-value head."""
        return self.slice(head.layer, kind, self.index(head, kind))

    def _checked(self, module: nn.Module | None, kind: Slice) -> nn.Linear:
        layout = self.layout
        if module is None:
            raise ValueError(
                f"model_name_or_path: layers of type {layout.model_type!r} have no v_proj, but one fused matrix. "
                "Use a model with separate projections."
            )
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.dtype not in _FLOATS:
            stored = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
            raise ValueError(
                f"model_name_or_path: its projections are {type(module).__name__}{stored}, quantized or wrapped. "
                "Calibrate the base model without quantization_bit (the adapter loads on the quantized one, too), or "
                "dequantize the checkpoint."
            )
        heads, width = layout.n_kv_heads, weight.shape[0]
        if kind == "value" and width != heads * layout.head_dim:
            raise ValueError(
                f"model_name_or_path: a value projection is {width} wide, and {heads} heads of {layout.head_dim} "
                f"values need {heads * layout.head_dim}. Use another model."
            )
        return module


@contextmanager
def applied(weights: HeadWeights, steps: Sequence[Scaled]) -> Iterator[None]:
    """Changes the weights in place, ``W + alpha * left @ right`` (eq. 14), and gives them back bit by bit."""
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
    """Writes a PEFT LoRA adapter with a rank for each projection; its scaling is 1, step sizes are in the weights."""
    from peft import LoraConfig, TaskType

    factors = lora_factors(weights, steps)
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
    # PEFT keeps the names as a set, whose order changes from process to process
    content = read_json(folder / ADAPTER_CONFIG)
    content["target_modules"].sort()
    write_json(folder / ADAPTER_CONFIG, content)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor
        for name, both in factors.items()
        for side, factor in zip("AB", both, strict=True)
    }
    write_safetensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})


def lora_factors(weights: HeadWeights, steps: Sequence[Scaled]) -> dict[str, tuple[Tensor, Tensor]]:
    """``lora_A`` ``[R, in]`` and ``lora_B`` ``[out, R]`` of each projection, by its name.

    The edits of its heads lie side by side, zero outside of them: ``R`` is the sum of their ranks.
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
