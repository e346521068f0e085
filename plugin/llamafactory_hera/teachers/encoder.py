"""The frozen vision encoder whose features say which images are neighbours."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .check import TeacherInfo, check_teacher
from .files import teacher_fingerprint
from .hub import teacher_folder
from .naflex import patch_inputs
from .processor import TeacherProcessor

# Weights that no feature reads: a checkpoint may lack them.
_UNREAD_WEIGHTS = ("mask_token", "head.", "pooler.")


class VisionTeacher:
    """A frozen vision model with its own image processor.

    It is no `torch.nn.Module`: assigned to a model or trainer it registers no parameters, and `train()` of the
    student does not reach it.

    Attributes:
        info: What its config files say.
        processor: Its image processor.
        fingerprint: Digest of its config, processor settings and weights, see `teacher_fingerprint`.
        device: Where it runs.
    """

    def __init__(
        self, model: torch.nn.Module, processor: TeacherProcessor, info: TeacherInfo, fingerprint: str
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.processor = processor
        self.info = info
        self.fingerprint = fingerprint
        self.device: torch.device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        key: str = "hera_teacher",
    ) -> "VisionTeacher":
        """Loads a teacher from a folder or a hub id; every rank gets a whole copy, also under ZeRO-3 and FSDP.

        Args:
            name_or_path: A folder or a hub id, of a model type in `families.FAMILIES`.
            device: Default: the current CUDA device, else the CPU.
            dtype: Of weights and computation; default float32, whatever the checkpoint is stored in. bfloat16 halves
                the memory and changes a few near-tied neighbours.
            key: The config key to name in errors.

        Raises:
            ValueError: The teacher cannot be used (see `check_teacher`), lacks weights, or its processor's image size
                is not the one that its position embeddings are for.
        """
        info = check_teacher(name_or_path, key)
        processor = TeacherProcessor.from_info(info, key)
        folder = teacher_folder(name_or_path, key)
        fingerprint = teacher_fingerprint(folder)
        model = _load_model(info, folder, dtype or torch.float32, key)
        _check_image_size(model.config, processor, info, key)
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor, info, fingerprint)

    @property
    def dim(self) -> int:
        """Length D of a feature."""
        return self.info.hidden_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        height, width = self.processor.pixel_size
        return height // self._model.config.patch_size, width // self._model.config.patch_size

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """Processes images of any mode with the teacher's own processor into ``[B, 3, h, w]`` on the CPU."""
        return self.processor.batch(images)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Computes the features of preprocessed images, the same inside a training step as outside.

        Args:
            pixel_values: ``[B, 3, h, w]`` on any device.

        Returns:
            ``[B, D]`` in float32 on the teacher's device, without gradient: the output CLS token after the final
            norm (paper, sec. 3), or the mean of the patch tokens for encoders without one.
        """
        output = self._forward(pixel_values)
        family = self.info.family
        if family.output == "pooled":
            return output.pooler_output.float()
        tokens = output.last_hidden_state.float()
        return tokens[:, 0] if family.output == "cls" else tokens.mean(dim=1)

    @torch.no_grad()
    def encode_patches(self, pixel_values: Tensor) -> Tensor:
        """Computes the features of the patches of preprocessed images.

        Args:
            pixel_values: ``[B, 3, H, W]`` on any device.

        Returns:
            ``[B, h, w, D]`` in float32 on the teacher's device, without gradient: the output's patch tokens as the
            grid that they are, without CLS and register tokens.
        """
        patch = self._model.config.patch_size
        height, width = (side // patch for side in pixel_values.shape[2:])
        tokens = self._forward(pixel_values).last_hidden_state.float()
        # whatever else there is (CLS, registers) comes first
        return tokens[:, -height * width :].unflatten(1, (height, width))

    def _forward(self, pixel_values: Tensor) -> Any:
        if self._model.training:
            self._model.eval()
        pixel_values = pixel_values.to(self.device, self._dtype)
        # The training step's autocast must not reach in here: features would depend on where they were computed.
        with torch.autocast(self.device.type, enabled=False):
            if self.info.family.naflex:
                return self._model(**patch_inputs(pixel_values, self._model.config.patch_size))
            return self._model(pixel_values)


def _load_model(info: TeacherInfo, folder: Path, dtype: torch.dtype, key: str) -> torch.nn.Module:
    import transformers

    model_class = getattr(transformers, info.family.model_class)
    config = model_class.config_class.from_pretrained(folder)
    if info.model_type == "vit":
        options: dict[str, Any] = {"add_pooling_layer": False}
    else:
        options = {}
        if not info.has_cls:
            # The attention-pooling head of SigLIP is not what is read.
            config.vision_use_head = False
    with whole_model_on_every_rank(), _quiet(transformers.utils.logging):
        model, loading = model_class.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **options
        )
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in _UNREAD_WEIGHTS))
    if missing:
        raise ValueError(
            f"{key}: the weights of {info.name} lack {len(missing)} tensors of a {info.family.model_class}, first "
            f"{missing[0]}. Its config.json and weights do not belong together: copy or download it again."
        )
    return model


def _check_image_size(config: Any, processor: TeacherProcessor, info: TeacherInfo, key: str) -> None:
    if info.family.any_size or info.family.naflex:
        return
    size = config.image_size
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if processor.pixel_size != expected:
        raise ValueError(
            f"{key}: the image processor of {info.name} gives images of {processor.pixel_size} pixels, its model "
            f"takes {expected}. Use the preprocessor_config.json that belongs to the model."
        )


@contextmanager
def whole_model_on_every_rank() -> Iterator[None]:
    # While a ZeRO-3 config lives, from_pretrained partitions every model that it loads, and with FSDP's efficient
    # loading it leaves all ranks but one without weights. Both wait for an engine to gather them, and no engine ever
    # holds the teacher.
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    efficient_loading = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if efficient_loading is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient_loading


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    # The loading report lists the text half of CLIP and SigLIP checkpoints as unexpected, a page of it.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
