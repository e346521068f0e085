"""The two checkpoints that a model is built of: what is checked of them, and their tensors under the model's names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..heads.families import FAMILIES
from ..hub import CONFIG_FILE, local_folder, weight_files

LANGUAGE_KEY, VISION_KEY = "--language-model", "--vision-model"
_WHAT = {
    LANGUAGE_KEY: "a language model such as Qwen/Qwen3-8B",
    VISION_KEY: "a vision encoder such as google/siglip2-so400m-patch14-384",
}

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# Buffers that old checkpoints hold and that are computed today.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")


@dataclass(frozen=True)
class Source:
    """A checkpoint in memory."""

    folder: Path
    config: Any  # of a vision encoder that of its vision half
    weights: dict[str, Tensor]  # name inside a LLaVA checkpoint -> tensor as stored


@dataclass(frozen=True)
class Tower:
    """How the vision half of a checkpoint is named, and what LLaVA takes of its output."""

    own_prefix: str  # in front of its tensors, in checkpoints that hold more than it
    stored_prefix: str  # in front of them inside a LLaVA checkpoint
    has_cls: bool  # its first token is a CLS token, which LLaVA leaves out
    any_size: bool = False  # its position embeddings are interpolated to the image


#: ``model_type`` of the vision configuration -> its tower. Fixed-resolution SigLIP2 calls itself SigLIP.
TOWERS = {
    "clip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=True),
    "siglip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=False),
    "dinov2": Tower("dinov2.", "vision_tower.", has_cls=True, any_size=True),
}
# Checkpoints with a text half, whose vision half is one of them.
_NESTED = ("clip", "siglip")
# What some language models (Gemma 2, Granite, Cohere 2) do to their logits.
_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def open_language_model(name_or_path: str) -> Source:
    """A language model; its configuration is checked before its weights are fetched."""
    folder, config = read_config(name_or_path, LANGUAGE_KEY)
    if config.model_type not in FAMILIES or hasattr(config, "vision_config"):
        raise ValueError(
            f"{LANGUAGE_KEY}: {folder} ({config.model_type}) is not a language model alone whose heads are known. "
            f"Give one of these types: {', '.join(sorted(FAMILIES))}. A new type is added to FAMILIES in "
            "heads/families.py; a multimodal model is trained as it is, with model_name_or_path."
        )
    for key in _LOGITS:
        if (value := getattr(config, key, None)) not in (None, 1):
            raise ValueError(
                f"{LANGUAGE_KEY}: {folder} ({config.model_type}) has {key}: {value} behind its lm_head, and LLaVA "
                "has no place for it: the built model's logits would be others. Give another language model."
            )
    folder, stored = _read_weights(name_or_path, LANGUAGE_KEY)
    weights = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    if EMBEDDING not in weights:
        raise ValueError(
            f"{LANGUAGE_KEY}: the weights of {folder} hold no model.embed_tokens.weight; give the checkpoint of a "
            "causal language model, as `save_pretrained` writes it."
        )
    if config.tie_word_embeddings and HEAD in weights:
        if torch.equal(weights[HEAD], weights[EMBEDDING]):
            del weights[HEAD]
        else:
            config.tie_word_embeddings = False  # as transformers loads it: its logits come from the stored head
    return Source(folder, config, weights)


def open_vision_encoder(name_or_path: str) -> Source:
    """The vision half of a vision encoder of :data:`TOWERS`."""
    folder, config = read_config(name_or_path, VISION_KEY)
    config = config.vision_config if config.model_type in _NESTED else config
    tower = TOWERS.get(config.model_type)
    if tower is None:
        raise ValueError(
            f"{VISION_KEY}: {folder} ({config.model_type}) cannot be the vision tower; give one of these types: "
            f"{', '.join(sorted((*TOWERS, *_NESTED)))}. LLaVA takes images of one size, so not SigLIP2 NaFlex, and "
            "would take register tokens for patches, so not DINOv2 with registers."
        )
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False  # LLaVA never reads its pooling head
    folder, stored = _read_weights(name_or_path, VISION_KEY)
    prefix = tower.own_prefix if any(name.startswith(tower.own_prefix) for name in stored) else ""
    weights = {
        tower.stored_prefix + name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}head.")
    }
    return Source(folder, config, weights)


def read_config(name_or_path: str, key: str) -> tuple[Path, Any]:
    """The folder of a checkpoint, without its weights when it is a hub model, and its configuration, not quantized."""
    from transformers import AutoConfig

    folder = local_folder(name_or_path, key, _WHAT[key], weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each configuration class has its own checks and errors
        raise ValueError(
            f"{key}: {folder / CONFIG_FILE} is not a valid configuration ({one_line(error)}). Correct it, or copy or "
            "download it again, whole."
        ) from error
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        raise ValueError(
            f"{key}: {folder} is quantized (quantization_config in {CONFIG_FILE}, method "
            f"{quantized.get('quant_method')}); give the unquantized checkpoint. Training can quantize the built "
            "model (quantization_bit)."
        )
    return folder, config


def _read_weights(name_or_path: str, key: str) -> tuple[Path, dict[str, Tensor]]:
    """The folder, and every stored tensor in its own dtype."""
    folder = local_folder(name_or_path, key, _WHAT[key])
    weights: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            weights.update(_tensors(file))
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download {folder.name} again, whole.") from error
    return folder, {name: tensor for name, tensor in weights.items() if not name.endswith(_COMPUTED)}


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return {name: tensor.clone() for name, tensor in tensors.items()}  # no two of them share memory
    except Exception as error:  # unpickling raises whatever a broken file leads to
        raise ValueError(f"{file} cannot be read as named tensors ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    """An error of another library in one line of at most 300 characters, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
