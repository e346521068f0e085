"""Which vision models can be a teacher, and which of their outputs is the image's vector.

The teacher's output CLS token is the paper's choice (arXiv 2606.23885, sec. 3). Encoders that have none give the mean
of their patch tokens, which is this project's choice. Register tokens take part in neither.
"""

from dataclasses import dataclass
from typing import Literal

# Which tensor of the model's output becomes the feature:
# - "cls": the first token of `last_hidden_state`, already normalised by the model's final norm;
# - "pooled": `pooler_output`, for CLIP, whose final norm is applied to the CLS token there and nowhere else;
# - "mean": the mean over the tokens of `last_hidden_state`, which are patches only.
Output = Literal["cls", "pooled", "mean"]


@dataclass(frozen=True)
class TeacherFamily:
    """How one `model_type` of a `config.json` is loaded and read.

    Attributes:
        model_class: Name of the transformers class of the vision model alone.
        output: Which output is the feature, see `Output`.
        nested: The checkpoint holds a text model too; the vision model's config is under `vision_config`.
        any_size: The model takes images of other sizes than `config.image_size`.
        naflex: The model takes patches with their grid shape, not images (SigLIP2 NaFlex).
    """

    model_class: str
    output: Output
    nested: bool = False
    any_size: bool = False
    naflex: bool = False

    @property
    def has_cls(self) -> bool:
        """Whether the feature is a CLS token."""
        return self.output != "mean"


# The fixed-resolution SigLIP2 checkpoints call themselves "siglip"; "siglip2" is the NaFlex variant.
FAMILIES: dict[str, TeacherFamily] = {
    "dinov2": TeacherFamily("Dinov2Model", "cls", any_size=True),
    "dinov2_with_registers": TeacherFamily("Dinov2WithRegistersModel", "cls", any_size=True),
    "dinov3_vit": TeacherFamily("DINOv3ViTModel", "cls", any_size=True),
    "vit": TeacherFamily("ViTModel", "cls"),
    "clip": TeacherFamily("CLIPVisionModel", "pooled", nested=True),
    "clip_vision_model": TeacherFamily("CLIPVisionModel", "pooled"),
    "siglip": TeacherFamily("SiglipVisionModel", "mean", nested=True),
    "siglip_vision_model": TeacherFamily("SiglipVisionModel", "mean"),
    "siglip2": TeacherFamily("Siglip2VisionModel", "mean", nested=True, naflex=True),
    "siglip2_vision_model": TeacherFamily("Siglip2VisionModel", "mean", naflex=True),
}
