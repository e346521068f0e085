"""Accepted updates as a standard PEFT LoRA adapter."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .weights import Edit, HeadWeights, Scaled, Slice

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(folder: Path, weights: HeadWeights, steps: Sequence[Scaled], base_model: str) -> None:
    """Writes the adapter's two files.

    Its rank differs from projection to projection and is what their edits need; its scaling is 1, since the step
    sizes are in its weights. Projections without an edit are not in it.

    Args:
        folder: An existing folder.
        weights: Of the base model.
        steps: Accepted updates with their step sizes; at least one.
        base_model: Name of the base model.
    """
    from peft import LoraConfig, TaskType

    tensors: dict[str, Tensor] = {}
    for (layer, kind), edits in _by_projection(steps).items():
        prefix = f"base_model.model.{weights.names[layer, kind]}"
        a, b = _lora_factors(weights, layer, kind, edits)
        tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    ranks = adapter_ranks(weights, steps)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_model,
        inference_mode=True,
        target_modules=list(ranks),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        lora_dropout=0.0,
    )
    config.save_pretrained(str(folder))
    # PEFT keeps the names as a set, whose order changes from process to process
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    content["target_modules"].sort()
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def adapter_ranks(weights: HeadWeights, steps: Sequence[Scaled]) -> dict[str, int]:
    """The rank that each projection needs, by its name: the sum of what its heads' edits need."""
    return {
        weights.names[layer, kind]: sum(edit.left.shape[1] for edit, _ in edits)
        for (layer, kind), edits in _by_projection(steps).items()
    }


def _lora_factors(
    weights: HeadWeights, layer: int, kind: Slice, edits: Sequence[tuple[Edit, float]]
) -> tuple[Tensor, Tensor]:
    """The edits of one projection as LoRA factors: their directions side by side, zero outside of their blocks.

    Returns:
        ``lora_A`` ``[R, in]`` and ``lora_B`` ``[out, R]``, where ``R`` is the sum of the edits' ranks; the update of
        the whole weight is ``lora_B @ lora_A``.
    """
    n_out, n_in = weights.projections[layer, kind].weight.shape
    rank = sum(edit.left.shape[1] for edit, _ in edits)
    a, b = torch.zeros(rank, n_in), torch.zeros(n_out, rank)
    start = 0
    for edit, alpha in edits:
        rows, block = slice(start, start + edit.left.shape[1]), weights.block(edit.index)
        a[rows, block if kind == "output" else slice(None)] = edit.right.cpu()
        b[block if kind == "value" else slice(None), rows] = alpha * edit.left.cpu()
        start = rows.stop
    return a, b


def _by_projection(steps: Sequence[Scaled]) -> dict[tuple[int, Slice], list[tuple[Edit, float]]]:
    found: dict[tuple[int, Slice], list[tuple[Edit, float]]] = {}
    for update, alpha in steps:
        for edit in update.edits:
            found.setdefault((edit.layer, edit.kind), []).append((edit, alpha))
    return dict(sorted(found.items()))
