"""The teacher's own image processor alone, for use in DataLoader workers: it loads no weights."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .check import TeacherInfo, check_teacher
from .naflex import grid_side, square_pixels


class TeacherProcessor:
    """Turns PIL images into the pixel tensor that a teacher takes. Picklable.

    Attributes:
        pixel_size: Height and width of what it returns.
    """

    def __init__(self, processor: Any, info: TeacherInfo, grid: int | None, key: str) -> None:
        self._processor = processor
        self._grid = grid
        # Two shapes of image show whether the processor gives one size to all.
        sizes = [tuple(self(Image.new("RGB", size)).shape[1:]) for size in ((48, 64), (64, 48))]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{key}: the image processor of {info.name} gives images of different sizes ({sizes[0]}, {sizes[1]}), "
                'which cannot form a batch. In its preprocessor_config.json set "do_center_crop": true with a '
                '"crop_size", or a "size" with "height" and "width".'
            )
        self.pixel_size: tuple[int, int] = sizes[0]

    @classmethod
    def from_pretrained(cls, name_or_path: str, key: str = "hera_teacher") -> "TeacherProcessor":
        """Loads the image processor of a teacher from a folder or a hub id.

        Raises:
            ValueError: The teacher cannot be used (see `check_teacher`), or its processor gives images of different
                sizes.
        """
        return cls.from_info(check_teacher(name_or_path, key), key)

    @classmethod
    def from_info(cls, info: TeacherInfo, key: str = "hera_teacher") -> "TeacherProcessor":
        """As `from_pretrained`, for a teacher that was checked before."""
        import transformers

        processor = transformers.AutoImageProcessor.from_pretrained(info.path)
        grid = None
        if info.family.naflex:
            model_class = getattr(transformers, info.family.model_class)
            grid = grid_side(model_class.config_class.from_pretrained(info.path).num_patches)
        return cls(processor, info, grid, key)

    def __call__(self, image: Image.Image) -> Tensor:
        """Processes one image of any mode.

        Returns:
            ``[3, h, w]`` in float32.
        """
        image = image.convert("RGB")
        if self._grid is not None:
            return square_pixels(image, self._processor, self._grid)
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Processes images one by one.

        Returns:
            ``[B, 3, h, w]`` in float32.
        """
        return torch.stack([self(image) for image in images])
