"""The two checkpoints that a model is built of: what is checked of them, and their tensors under the model's names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json
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
# As the first releases of AutoGPTQ and AutoAWQ wrote them, without a word in the model's own configuration.
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint in memory.

    Attributes:
        folder: Its files.
        config: Its configuration; of a vision encoder that of its vision half.
        weights: Name inside a LLaVA checkpoint, as every version of transformers reads it -> tensor as stored.
    """

    folder: Path
    config: Any
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Tower:
    """How the vision half of a checkpoint is named, and what LLaVA takes of its output.

    Attributes:
        own_prefix: In front of the vision half's tensors, in checkpoints that hold more than it.
        stored_prefix: In front of them inside a LLaVA checkpoint.
        has_cls: Its first token is a CLS token, which is left out of the image's tokens.
        any_size: Its position embeddings are interpolated to the image.
    """

    own_prefix: str
    stored_prefix: str
    has_cls: bool
    any_size: bool = False


#: ``model_type`` of the vision configuration -> its tower. Fixed-resolution SigLIP2 calls itself SigLIP.
TOWERS = {
    "clip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=True),
    "siglip_vision_model": Tower("vision_model.", "vision_tower.vision_model.", has_cls=False),
    "dinov2": Tower("dinov2.", "vision_tower.", has_cls=True, any_size=True),
}
# Checkpoints with a text half -> the type of their vision half.
_NESTED = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def open_language_model(name_or_path: str) -> Source:
    """A language model; its configuration is checked before its weights are fetched.

    Raises:
        ValueError: Quantised, another kind of model, an architecture that ``heads/families.py`` lacks, or weights
            that are not whole or have other rows than ``vocab_size``.
    """
    folder, values = read_config(name_or_path, LANGUAGE_KEY)
    model_type = values["model_type"]
    if model_type in TOWERS or model_type in _NESTED:
        raise ValueError(
            f"{LANGUAGE_KEY}: {folder} is a vision encoder ({model_type}); were {LANGUAGE_KEY} and {VISION_KEY} "
            f"swapped? Give {_WHAT[LANGUAGE_KEY]}."
        )
    if "vision_config" in values:
        raise ValueError(
            f"{LANGUAGE_KEY}: {folder} ({model_type}) is multimodal already; train it as it is with "
            "model_name_or_path, or give its language model alone."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"{LANGUAGE_KEY}: the model type {model_type!r} of {folder} is missing from FAMILIES in "
            "heads/families.py, which says where the heads of an architecture are. Add the line for it if its layers "
            "have an output projection that takes the heads side by side, or give one of these: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    config = _open_config(folder, LANGUAGE_KEY)
    folder, stored = _read_weights(name_or_path, LANGUAGE_KEY)
    weights = {f"language_model.{name}": tensor for name, tensor in stored.items()}
    if EMBEDDING not in weights:
        raise ValueError(
            f"{LANGUAGE_KEY}: the weights of {folder} hold no model.embed_tokens.weight; give the checkpoint of a "
            "causal language model, as `save_pretrained` writes it."
        )
    for name in (EMBEDDING, HEAD):
        if name in weights and weights[name].shape[0] != config.vocab_size:
            raise ValueError(
                f"{LANGUAGE_KEY}: vocab_size in {folder / CONFIG_FILE} is {config.vocab_size}, and "
                f"{name.removeprefix('language_model.')} is stored with {weights[name].shape[0]} rows. Give "
                "configuration and weights of the same model, or set vocab_size to the stored rows."
            )
    if config.tie_word_embeddings and HEAD in weights:
        if torch.equal(weights[HEAD], weights[EMBEDDING]):
            del weights[HEAD]
        else:
            config.tie_word_embeddings = False  # as transformers loads it: its logits come from the stored head
    return Source(folder, config, weights)


def open_vision_encoder(name_or_path: str) -> Source:
    """The vision half of a vision encoder.

    Raises:
        ValueError: Quantised, not a vision encoder of :data:`TOWERS`, or its weights are not whole.
    """
    folder, values = read_config(name_or_path, VISION_KEY)
    model_type = values["model_type"]
    tower = TOWERS.get(_NESTED.get(model_type, model_type))
    if tower is None:
        raise ValueError(_not_a_tower(folder, model_type))
    config = _open_config(folder, VISION_KEY)
    config = config.vision_config if model_type in _NESTED else config
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


def _not_a_tower(folder: Path, model_type: str) -> str:
    if model_type in FAMILIES:
        return (
            f"{VISION_KEY}: {folder} is a language model ({model_type}); were {LANGUAGE_KEY} and {VISION_KEY} "
            f"swapped? Give {_WHAT[VISION_KEY]}."
        )
    remedy = f"give one of these types: {', '.join(sorted((*TOWERS, *_NESTED)))}"
    if model_type.startswith("siglip2"):
        remedy = "it takes patches of any grid (NaFlex), LLaVA takes images of one size; give a fixed-resolution one"
    if model_type == "dinov2_with_registers":
        remedy = "its register tokens cannot be told from patches by LLaVA; give facebook/dinov2-large"
    return f"{VISION_KEY}: {folder} ({model_type}) cannot be the vision tower: {remedy}."


def read_config(name_or_path: str, key: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint, without its weights when it is a hub model, and its ``config.json``.

    Raises:
        ValueError: It cannot be found, is broken, or describes a quantised model; names ``key``.
    """
    folder = local_folder(name_or_path, key, _WHAT[key], weights=False)
    try:
        values = read_json(folder / CONFIG_FILE)
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download it again, whole.") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise ValueError(
            f"{key}: {folder / CONFIG_FILE} has no model_type, so it does not say what the model is; give the folder "
            "of a transformers model with its own config.json."
        )
    quantised_by = next((name for name in _QUANTISED_FILES if (folder / name).is_file()), None)
    for part in (values, values.get("vision_config")):
        quantised = part.get("quantization_config") if isinstance(part, dict) else None
        if quantised:
            method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
            quantised_by = f"quantization_config in {CONFIG_FILE}, method {method}"
    if quantised_by:
        raise ValueError(
            f"{key}: {folder} is quantised ({quantised_by}), and weights are copied as they are; give the unquantised "
            "checkpoint. Training can quantise the built model (quantization_bit)."
        )
    return folder, values


def _open_config(folder: Path, key: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # each configuration class has its own checks and errors
        raise ValueError(
            f"{key}: {folder / CONFIG_FILE} is not a valid configuration ({one_line(error)}). Correct it, or copy or "
            "download it again, whole."
        ) from error


def _read_weights(name_or_path: str, key: str) -> tuple[Path, dict[str, Tensor]]:
    """The folder, and every stored tensor in its own dtype."""
    folder = local_folder(name_or_path, key, _WHAT[key])
    weights = {}
    try:
        for file in weight_files(folder):
            weights.update(_tensors(file))
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download {folder.name} again, whole.") from error
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            raise ValueError(
                f"{key}: {folder} holds {name} as {tensor.dtype}, as quantised models do; give the unquantised "
                "checkpoint."
            )
    return folder, {name: tensor for name, tensor in weights.items() if not name.endswith(_COMPUTED)}


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever a broken file leads to
        raise ValueError(f"{file} cannot be read ({one_line(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds something else than named tensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}  # no two of them share memory


def one_line(error: Exception) -> str:
    """An error of another library in one line of at most 300 characters, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
