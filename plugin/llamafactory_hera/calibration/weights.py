"""The value and output weights of single heads: read, changed in place, and saved as a PEFT adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..files import write_json, write_safetensors
from ..heads.families import decoder_layers, head_layout, model_config, output_projection
from ..heads.targets import Target

#: The value rows of a key-value head, or the output columns of a query head.
Slice = Literal["value", "output"]

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Edit(NamedTuple):
    """The low-rank update ``left @ right`` of one slice, in fp32 and without its step size."""

    head: Target  #: For a value slice, the first of the heads that share it.
    kind: Slice
    left: Tensor  #: [m, r]
    right: Tensor  #: [r, n]


class Update(NamedTuple):
    """Edits that share one step size; empty if the heads already equal their anchors."""

    heads: tuple[Target, ...]
    edits: tuple[Edit, ...]


#: An update with its step size, alpha in eq. 14.
Scaled = tuple[Update, float]


class HeadWeights:
    """The weights of a model, sliced by head.

    ``v_proj`` has a block of rows for each key-value head, and ``o_proj`` has a block of columns for each query head.
    Under grouped-query attention, a group of query heads shares a block of ``v_proj``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = head_layout(model_config(model))
        self.head_dim = self.layout.head_dim
        text = model_config(model).get_text_config()
        self.n_kv_heads: int = getattr(text, "num_key_value_heads", None) or self.layout.n_heads
        self.group_size = self.layout.n_heads // self.n_kv_heads
        self.projections: dict[tuple[int, Slice], nn.Linear] = {}
        for layer, module in enumerate(decoder_layers(model)):
            value = getattr(module.self_attn, "v_proj", None)
            self.projections[layer, "value"] = self._checked(value, "value")
            output = output_projection(module, self.layout.layers[layer])
            self.projections[layer, "output"] = self._checked(output, "output")
        modules = {module: name for name, module in model.named_modules()}
        self.names = {key: modules[projection] for key, projection in self.projections.items()}

    def group(self, head: Target) -> tuple[Target, ...]:
        """Lists the query heads that share a head's value block, including the head."""
        first = (head.head or 0) // self.group_size * self.group_size
        return tuple(Target(head.layer, first + offset) for offset in range(self.group_size))

    def block(self, head: Target, kind: Slice) -> slice:
        """Returns the rows of ``v_proj``, or the columns of ``o_proj``, that belong to a query head."""
        index = (head.head or 0) // (self.group_size if kind == "value" else 1)
        return slice(index * self.head_dim, (index + 1) * self.head_dim)

    def of_head(self, head: Target, kind: Slice) -> Tensor:
        """Returns a view of a query head's slice: ``[d, D]`` of ``v_proj``, or ``[D, d]`` of ``o_proj``."""
        weight, block = self.projections[head.layer, kind].weight.detach(), self.block(head, kind)
        return weight[block] if kind == "value" else weight[:, block]

    def _checked(self, module: nn.Module | None, kind: Slice) -> nn.Linear:
        rows = self.n_kv_heads * self.head_dim if kind == "value" else self.layout.hidden_size
        if isinstance(module, nn.Linear) and module.weight.dtype in _FLOATS and len(module.weight) == rows:
            return module
        raise ValueError(
            f"model: the {kind} projections of this {self.layout.model_type!r} model are quantized, wrapped or fused; "
            "use an unquantized model with separate projections (the adapter also fits the quantized model)."
        )


@contextmanager
def applied(weights: HeadWeights, steps: Sequence[Scaled]) -> Iterator[None]:
    """Changes the weights in place to ``W + alpha * left @ right`` (eq. 14), and then restores them bit for bit."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for update, alpha in steps:
            for edit in update.edits:
                view = weights.of_head(edit.head, edit.kind)
                saved.append((view, view.clone()))
                view.copy_(view.float() + alpha * (edit.left @ edit.right))
        yield
    finally:
        for view, original in reversed(saved):
            view.copy_(original)


def save_adapter(folder: Path, weights: HeadWeights, steps: Sequence[Scaled], base_model: str) -> None:
    """Writes a PEFT LoRA adapter with scaling 1.

    A projection's factors are its edits' factors with step sizes applied, padded with zeros and concatenated.
    """
    from peft import LoraConfig, TaskType

    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for edit, alpha in ((edit, alpha) for update, alpha in steps for edit in update.edits):
        key, rank, block = (edit.head.layer, edit.kind), edit.left.shape[1], weights.block(edit.head, edit.kind)
        n_out, n_in = weights.projections[key].weight.shape
        a, b = torch.zeros(rank, n_in), torch.zeros(n_out, rank)
        a[:, block if edit.kind == "output" else slice(None)] = edit.right.cpu()
        b[block if edit.kind == "value" else slice(None)] = alpha * edit.left.cpu()
        factors.setdefault(weights.names[key], []).append((a, b))
    tensors: dict[str, Tensor] = {}
    for name, pairs in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.cat([a for a, _ in pairs])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
    write_safetensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
    ranks = {name: sum(len(a) for a, _ in factors[name]) for name in sorted(factors)}
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, base_model_name_or_path=base_model, inference_mode=True)
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = config.alpha_pattern = ranks
    # PEFT would store target_modules as a set, whose order changes from process to process.
    write_json(folder / ADAPTER_CONFIG, config.to_dict() | {"target_modules": list(ranks)})
