"""Accepted updates as a standard PEFT LoRA adapter."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import read_json, write_json
from .weights import HeadWeights, Scaled, Slice

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

    factors = lora_factors(weights, steps)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
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
    content = read_json(folder / CONFIG_FILE)
    content["target_modules"].sort()
    write_json(folder / CONFIG_FILE, content)
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def lora_factors(weights: HeadWeights, steps: Sequence[Scaled]) -> dict[str, tuple[Tensor, Tensor]]:
    """The LoRA factors of each projection, by its name: the edits of its heads side by side, zero outside of them.

    Returns:
        ``lora_A`` ``[R, in]`` and ``lora_B`` ``[out, R]``, where ``R`` is the sum of the edits' ranks; the update of
        the whole weight is ``lora_B @ lora_A``.
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
