"""The alignment term of an objective on visual tokens: the choice of tokens, the teacher's pixels, and the loss."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from ..config import HeraConfig
from ..distributed import rank
from ..heads.capture import HeadCapture, LayerCapture
from ..heads.tokens import grid_side, token_positions
from ..objectives.tokens import Plan, Step, TokenBatch, TokenObjective
from ..teachers.encoder import normalization
from .term import Prepared, TermOutput, check_shape, mean_term


@dataclass(frozen=True)
class StudentImages:
    """Gives the teacher the pixels that the student sees, so each visual token and its patch show the same place."""

    side: int  #: The number of tokens along each side of an image's grid.
    processor: Any  #: The student's image processor.
    #: Pixels along each side that the vision tower's patches cover (378 of 384 at patch size 14); 0 means all.
    covered: int = 0
    _held: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, compare=False)

    def pixels(self, batch: dict[str, Any], image: Tensor) -> Tensor:
        """Selects each sample's image by ``hera_image`` and undoes the student's normalization: ``[B, 3, S, S]``."""
        values = batch.get("pixel_values")
        if values is None:  # a batch without images
            return torch.zeros(len(image), 3, 1, 1, device=image.device)
        index, count = image.unbind(dim=1)
        place = (count.cumsum(0) - count + index).clamp(max=len(values) - 1)
        mean, std = self._normalization(values.device)
        end = self.covered or values.shape[-1]
        return (values[place][..., :end, :end].float() * std + mean).clamp(0, 1)

    def _normalization(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._held:  # copied once, because every copy makes the CPU wait
            self._held[device] = tuple(each.to(device) for each in normalization(self.processor))
        return self._held[device]

    def fingerprint(self, teacher: str) -> str:
        """Returns a hash of the teacher's fingerprint, the grid, and the settings of the student's processor."""
        described = f"{teacher} {self.side} {self.covered} {self.processor.to_json_string()}"
        return hashlib.sha256(described.encode()).hexdigest()


def student_images(config: HeraConfig, model_configuration: Any, image_processor: Any) -> StudentImages | None:
    """Describes the student's images for an objective on tokens; returns None for objectives on pooled vectors."""
    objective = config.objective_class()
    if not issubclass(objective, TokenObjective):
        return None
    objective.check_model(model_configuration, model_configuration._attn_implementation)
    side, name = grid_side(model_configuration, config.objective), model_configuration._name_or_path
    if image_processor is None:  # use the one in the model's folder
        try:
            image_processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model: {name!r} contains no image processor ({error}), but HeRA must undo its pixel normalization; "
                "save the model's processor there."
            ) from error
    # A vision teacher sees only the pixels that the student's patches cover; other teachers see the full image.
    patch = model_configuration.vision_config.patch_size if objective.teacher_class is None else 0
    return StudentImages(side, image_processor, covered=side * patch)


@dataclass(eq=False)
class TokenReader:
    """Decides which visual tokens to read in the next forward pass; the objective may choose them with a plan."""

    objective: TokenObjective
    student: StudentImages
    image_token: int  #: The id of the image placeholder.
    seed: int
    #: Micro-batches since the start of the run; saved in checkpoints, so a resumed run draws the same random numbers.
    n_micro_batches: int = 0

    def prepare(
        self, batch: dict[str, Any], inputs: dict[str, Tensor], has_image: Tensor, capture: HeadCapture | LayerCapture
    ) -> Prepared:
        """Sets the tokens to read in the next forward pass of ``batch``; ``inputs`` come from the collator."""
        ids, mask, image = batch["input_ids"], batch.get("attention_mask"), inputs["hera_image"]
        side = self.student.side
        positions = token_positions(ids, mask, image, self.image_token, side**2)
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        number, self.n_micro_batches = self.n_micro_batches, self.n_micro_batches + 1
        step = Step(ids, attended, positions, has_image, image[:, 1], side, self.seed, rank(), number)
        plan = self.objective.prepare(step) or Plan()
        capture.tokens(positions if plan.positions is None else plan.positions)
        planned = plan.valid is not None
        valid = has_image if plan.valid is None else plan.valid
        return Prepared(valid, inputs, planned, self.student.pixels(batch, image), plan.context)


def token_term(objective: TokenObjective, batch: TokenBatch) -> TermOutput:
    """Computes the term from this process's samples; every process must call it, even without images.

    It does not gather the tokens, because that would be too expensive.
    """
    valid = batch.valid
    tokens = torch.where(valid.view(1, -1, 1, 1), batch.tokens.float(), 0.0)
    teacher = torch.where(valid.view(-1, 1, 1), batch.teacher.float(), 0.0)
    projections = None if batch.projections is None else batch.projections.float()
    losses = objective(replace(batch, tokens=tokens, teacher=teacher, projections=projections))
    check_shape(objective, losses, [len(tokens), len(valid)])
    inputs = (tokens,) if projections is None else (tokens, projections)
    return mean_term(torch.where(valid, losses, 0.0), valid, inputs, teacher)[0]
