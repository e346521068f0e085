"""The vision encoder's image processor: whether it is there, and makes images that the encoder takes."""

from typing import Any

from PIL import Image

from ..teachers.files import CONFIG_FILE, PROCESSOR_FILES
from .sources import one_line
from .vision import KEY, VisionSource

_SETTINGS = PROCESSOR_FILES[0]


def open_image_processor(vision: VisionSource) -> tuple[Any, tuple[int, int]]:
    """The image processor, and height and width in pixels that it makes of every image.

    Raises:
        ValueError: It is missing or broken, its images differ in size, or the encoder takes another size.
    """
    from transformers import AutoImageProcessor

    folder = vision.folder
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ValueError(
            f"{KEY}: {folder} holds no {_SETTINGS}, which says how images are prepared; copy that of the same model "
            "into it."
        )
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        sizes = {_made_of(processor, size) for size in ((64, 48), (48, 80))}
    except Exception as error:  # transformers raises whatever a broken setting leads to
        raise ValueError(
            f"{KEY}: the image processor of {folder} cannot be used ({one_line(error)}). Copy or download its "
            f"{_SETTINGS} again, whole."
        ) from error
    if len(sizes) != 1:
        raise ValueError(
            f"{KEY}: the image processor of {folder} makes images of different sizes ({sorted(sizes)}); LLaVA needs "
            f"one size. Set do_center_crop, or a height and a width, in its {_SETTINGS}."
        )
    made = sizes.pop()
    side = vision.config.image_size
    taken = (side, side) if isinstance(side, int) else tuple(side)
    if made != taken and not vision.tower.any_size:
        raise ValueError(
            f"{KEY}: the image processor of {folder} makes images of {_text(made)} pixels (size and crop_size in "
            f"{_SETTINGS}), the vision tower takes {_text(taken)} (image_size in {CONFIG_FILE}). Set them to "
            f"{_text(taken)}, or copy the {_SETTINGS} of the same model into the folder."
        )
    return processor, made


def _made_of(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    height, width = processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[-2:]
    return height, width


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
