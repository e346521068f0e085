"""Which vision encoders a LLaVA-style model can be built on, and which of their tokens it takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..heads.families import FAMILIES as TEXT_FAMILIES
from .sources import StoredTensor, open_config, read_config, stored_tensors

KEY = "--vision-model"


@dataclass(frozen=True)
class Tower:
    """How the vision half of a checkpoint is named, and what LLaVA takes of its output.

    Attributes:
        own_prefix: In front of the vision half's tensors, in checkpoints that hold more than it.
        stored_prefix: In front of them inside a LLaVA checkpoint, as every version of transformers reads it.
        has_cls: Its first token is a CLS token, which is left out of the image's tokens.
        unused: Parts that LLaVA never reads.
        any_size: Its position embeddings are interpolated to the image.
    """

    own_prefix: str
    stored_prefix: str
    has_cls: bool
    unused: tuple[str, ...] = ()
    any_size: bool = False


_CLIP = Tower("vision_model.", "vision_tower.vision_model.", has_cls=True)
_SIGLIP = Tower("vision_model.", "vision_tower.vision_model.", has_cls=False, unused=("head.",))

#: ``model_type`` of the vision configuration -> its tower. Fixed-resolution SigLIP2 calls itself SigLIP.
TOWERS: dict[str, Tower] = {
    "clip_vision_model": _CLIP,
    "siglip_vision_model": _SIGLIP,
    "dinov2": Tower("dinov2.", "vision_tower.", has_cls=True, unused=("classifier.",), any_size=True),
}
#: Checkpoints with a text half -> the type of their vision half.
NESTED = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# Buffers that old checkpoints hold and that are computed today.
_COMPUTED = "embeddings.position_ids"


@dataclass(frozen=True)
class VisionSource:
    """A vision encoder on disk.

    Attributes:
        folder: Its files.
        tower: How it is read.
        config: Its vision configuration.
        tensors: Name inside a LLaVA checkpoint -> tensor.
    """

    folder: Path
    tower: Tower
    config: Any
    tensors: dict[str, StoredTensor]

    @property
    def select_strategy(self) -> str:
        """LLaVA's name for which tokens it takes: all, or all but the first."""
        return "default" if self.tower.has_cls else "full"

    @property
    def additional_tokens(self) -> int:
        """Tokens of its output beside the patches."""
        return 1 if self.tower.has_cls else 0


def open_vision(folder: Path) -> VisionSource:
    """Reads configuration and tensor names of a vision encoder.

    Raises:
        ValueError: Not a vision encoder of :data:`TOWERS`, or its weights are not whole.
    """
    values = read_config(folder, KEY)
    model_type = values["model_type"]
    vision_type = NESTED.get(model_type, model_type)
    if vision_type not in TOWERS:
        raise ValueError(_refusal(folder, model_type, values))
    tower = TOWERS[vision_type]
    whole = open_config(folder, KEY)
    config = whole.vision_config if model_type in NESTED else whole
    if "head." in tower.unused:
        config.vision_use_head = False
    stored = stored_tensors(folder, KEY)
    prefix = tower.own_prefix if any(name.startswith(tower.own_prefix) for name in stored) else ""
    inside = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    tensors = {
        tower.stored_prefix + name: tensor
        for name, tensor in inside.items()
        if not name.startswith(tower.unused) and not name.endswith(_COMPUTED)
    }
    return VisionSource(folder, tower, config, tensors)


def _refusal(folder: Path, model_type: str, values: dict[str, Any]) -> str:
    if model_type in TEXT_FAMILIES:
        return (
            f"{KEY}: {folder} is a language model ({model_type}); were --language-model and {KEY} swapped? Give a "
            "vision encoder such as google/siglip2-so400m-patch14-384."
        )
    remedy = f"give one of these types: {', '.join(sorted((*TOWERS, *NESTED)))}"
    if model_type.startswith("siglip2"):
        remedy = (
            "it takes patches of any grid (NaFlex), and LLaVA takes images of one size; give a fixed-resolution one"
        )
    if model_type == "dinov2_with_registers":
        remedy = "its register tokens cannot be told from patches by LLaVA; give facebook/dinov2-large"
    return f"{KEY}: {folder} ({model_type}) cannot be the vision tower: {remedy}."
