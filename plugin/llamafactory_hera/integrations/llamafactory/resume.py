"""Loads the weights of a full checkpoint whose tensor names differ from the model's.

transformers 5 renames the tensors of some multimodal models when it saves them (LLaVA: ``model.language_model.…``
becomes ``language_model.model.…``), and its Trainer loads a checkpoint without renaming them back: nothing is loaded,
with a warning only, and the run goes on from the initial weights (seen with 5.6.0, also for plain SFT).
"""

import json
from pathlib import Path

from safetensors import safe_open
from torch import nn


def load_renamed_weights(model: nn.Module, checkpoint: str) -> bool:
    """Loads a checkpoint through ``from_pretrained``, which knows the renaming, where names differ.

    Args:
        model: The unwrapped transformers model, loaded in place.
        checkpoint: Folder with ``model.safetensors`` or its shards.

    Returns:
        False where the Trainer's own way does: no such files, or the names agree.
    """
    names = _tensor_names(Path(checkpoint))
    if not names or names <= model.state_dict().keys():
        return False
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    return True


def _tensor_names(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return set()
    with safe_open(weights, "pt") as file:
        return set(file.keys())
