"""The language model that a LLaVA-style model is built on: what is checked of it, and its tensors' new names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..heads.families import FAMILIES
from ..teachers.files import CONFIG_FILE
from .sources import StoredTensor, open_config, read_config, stored_tensors
from .vision import NESTED, TOWERS

KEY = "--language-model"

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Buffers that old checkpoints hold and that are computed today.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class LanguageSource:
    """A language model on disk.

    Attributes:
        folder: Its files.
        config: Its configuration.
        tensors: Name inside a LLaVA checkpoint -> tensor.
    """

    folder: Path
    config: Any
    tensors: dict[str, StoredTensor]

    @property
    def tied(self) -> bool:
        """Input and output embedding are one matrix."""
        return bool(self.config.tie_word_embeddings)

    @property
    def dtype(self) -> torch.dtype:
        """What its embedding is stored in."""
        return self.tensors[EMBEDDING].dtype


def open_language_model(folder: Path) -> LanguageSource:
    """Reads configuration and tensor names of a language model.

    Raises:
        ValueError: Another kind of model, an architecture that ``heads/families.py`` lacks, or weights that are not
            whole or have other rows than ``vocab_size``.
    """
    values = read_config(folder, KEY)
    model_type = values["model_type"]
    if model_type in TOWERS or model_type in NESTED:
        raise ValueError(
            f"{KEY}: {folder} is a vision encoder ({model_type}); were {KEY} and --vision-model swapped? Give a "
            "language model such as Qwen/Qwen3-8B."
        )
    if "vision_config" in values:
        raise ValueError(
            f"{KEY}: {folder} ({model_type}) is multimodal already; train it as it is with model_name_or_path, or "
            "give its language model alone."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"{KEY}: the model type {model_type!r} of {folder} is missing from FAMILIES in heads/families.py, which "
            "says where the heads of an architecture are. Add the line for it if its layers have an output projection "
            f"that takes the heads side by side, or give one of these: {', '.join(sorted(FAMILIES))}."
        )
    config = open_config(folder, KEY)
    tensors = {}
    for name, tensor in stored_tensors(folder, KEY).items():
        if not name.endswith(_COMPUTED):
            tensors[f"language_model.{name}"] = tensor
    if EMBEDDING not in tensors:
        raise ValueError(
            f"{KEY}: the weights of {folder} hold no model.embed_tokens.weight; give the checkpoint of a causal "
            "language model, as `save_pretrained` writes it."
        )
    for name in (EMBEDDING, HEAD):
        if name in tensors and tensors[name].shape[0] != config.vocab_size:
            raise ValueError(
                f"{KEY}: vocab_size in {folder / CONFIG_FILE} is {config.vocab_size}, and {tensors[name].name} is "
                f"stored with {tensors[name].shape[0]} rows. Give configuration and weights of the same model, or set "
                "vocab_size to the stored rows."
            )
    if config.tie_word_embeddings and HEAD in tensors:
        if tensors[HEAD].equals(tensors[EMBEDDING]):
            del tensors[HEAD]
        else:
            config.tie_word_embeddings = False  # as transformers loads it: its logits come from the stored head
    return LanguageSource(folder, config, tensors)
