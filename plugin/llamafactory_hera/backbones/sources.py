"""The two checkpoints that a model is built from: their configurations, and their tensors under LLaVA's names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from ..heads.families import FAMILIES
from ..hub import local_folder, weight_files

#: Names of the token embedding and of the output layer in a LLaVA checkpoint.
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"

# Buffers in old checkpoints that transformers now computes.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
# Configuration keys that scale or cap a model's logits (Gemma 2, Granite, Cohere 2). LLaVA does neither.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Source(NamedTuple):
    """A checkpoint whose configuration was accepted. Its weights may still be on the hub."""

    key: str  #: The command-line option for this checkpoint.
    name: str  #: Folder or hub id.
    folder: Path
    config: Any  #: The configuration; for a vision encoder, only its vision half.


class Tower(NamedTuple):
    """The layout of a vision encoder."""

    prefix: str  #: The prefix of the encoder's names in a checkpoint that also contains other parts.
    llava_prefix: str  #: The prefix of the same names in a LLaVA checkpoint.
    has_cls: bool  #: True if the first output token is a CLS token, which LLaVA omits.


#: ``model_type`` of the vision configuration -> layout. SigLIP2 models of fixed resolution have SigLIP's type.
TOWERS = {
    "clip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=True),
    "siglip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=False),
    "dinov2": Tower("dinov2.", "vision_tower.", has_cls=True),
}
# Types of checkpoints that have a text half in addition to one of these towers.
_WITH_TEXT = ("clip", "siglip")


def open_language(name: str) -> Source:
    """Reads the configuration of a language model, and refuses a model that cannot be a part of LLaVA."""
    source = _open("--language-model", name, "a language model such as Qwen/Qwen3-8B")
    config = source.config
    if config.model_type not in FAMILIES or any(getattr(config, key, None) not in (None, 1) for key in _LOGIT_CHANGES):
        raise _unsupported(source, FAMILIES, "without scaled or capped logits (existing VLMs need no build)")
    return source


def open_vision(name: str) -> Source:
    """Reads the configuration of the vision half of an encoder, and refuses types that are not in ``TOWERS``."""
    source = _open("--vision-model", name, "a vision encoder such as google/siglip2-so400m-patch14-384")
    config = source.config.vision_config if source.config.model_type in _WITH_TEXT else source.config
    if config.model_type not in TOWERS:
        raise _unsupported(source, (*TOWERS, *_WITH_TEXT), "without NaFlex or register tokens")
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # LLaVA does not use the pooling head
    return source._replace(config=config)


def language_weights(source: Source) -> dict[str, Tensor]:
    """Reads a language model under LLaVA's names, and unties the embeddings if its output layer differs."""
    weights = {f"language_model.{name}": tensor for name, tensor in _read(source).items()}
    if EMBEDDING not in weights:
        raise ValueError(f"{source.key}: {source.name} has no model.embed_tokens; give a causal language model.")
    if source.config.tie_word_embeddings and HEAD in weights:
        source.config.tie_word_embeddings = torch.equal(weights[HEAD], weights[EMBEDDING])
    if source.config.tie_word_embeddings:
        weights.pop(HEAD, None)
    return weights


def vision_weights(source: Source) -> dict[str, Tensor]:
    """Reads the tensors of a vision encoder, without the text half and the pooling head, under their LLaVA names."""
    tower, stored = TOWERS[source.config.model_type], _read(source)
    prefix = tower.prefix if any(name.startswith(tower.prefix) for name in stored) else ""
    return {
        tower.llava_prefix + name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}head.")
    }


def _open(key: str, name: str, what: str) -> Source:
    # Fetches only the small files: an unsuitable model is refused before gigabytes are downloaded.
    folder = local_folder(name, key, what, weights=False)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{key}: {name} is quantized; give the unquantized checkpoint.")
    return Source(key, name, folder, config)


def _unsupported(source: Source, types: Iterable[str], remark: str) -> ValueError:
    given, known = f"{source.name} ({source.config.model_type})", ", ".join(sorted(types))
    return ValueError(f"{source.key}: {given} is not supported; give a model of type {known}, {remark}.")


def _read(source: Source) -> dict[str, Tensor]:
    """Reads all tensors in their stored dtype."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(local_folder(source.name, source.key, "a complete checkpoint")):
        try:
            pickled = file.suffix != ".safetensors"
            stored = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{source.key}: {file} cannot be read ({error}); download it again.") from error
        # Tensors in a pickle may share memory, and safetensors would store only one of them.
        weights |= {name: tensor.clone() if pickled else tensor for name, tensor in stored.items()}
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        problem = f"{source.name} has weights that are NaN or infinity, such as {broken[0]}"
        raise ValueError(f"{source.key}: {problem}; download it again.")
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_COMPUTED)}
