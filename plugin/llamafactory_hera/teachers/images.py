"""Finds the images of a sample in any form that datasets use, decodes them, and computes their cache keys."""

import copy
import hashlib
import os
from base64 import b64decode
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import IterableDataset

ImageLike = str | os.PathLike | bytes | dict[str, Any] | Image.Image

KEY_BYTES = 16

#: The columns of a dataset that `sample_images` searches for images.
IMAGE_COLUMNS = ("images", "image", "messages", "prompt", "completion")
# The keys that may contain the image in an image part of a chat message, in order of precedence.
_PART_KEYS = ("image", "path", "url", "image_url")


def sample_images(row: Mapping[str, Any]) -> list[ImageLike]:
    """Returns the images of a dataset row in order, from an image column or else from its chat messages."""
    for column in ("images", "image"):
        cell = row.get(column)
        if found := [image for image in (cell if isinstance(cell, list | tuple) else [cell]) if image is not None]:
            return found
    return _message_images("messages", row) or _message_images("prompt", row) + _message_images("completion", row)


def images_by(images_of: Callable[[Any], list[ImageLike]], row: Any) -> list[ImageLike]:
    """Returns the images that a user's function finds in a row; raises ``ValueError`` if it does not return a list."""
    images = images_of(row)
    if not isinstance(images, list | tuple):
        raise ValueError(f"images_of returned {type(images).__name__}; return a list of images, [] if there are none.")
    return list(images)


def _message_images(column: str, row: Mapping[str, Any]) -> list[ImageLike]:
    messages = row.get(column)
    contents = [message.get("content") for message in messages] if isinstance(messages, list) else []
    found: list[Any] = []
    for part in (part for content in contents if isinstance(content, list) for part in content):
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            images = [part[key] for key in _PART_KEYS if part.get(key) is not None]
            # OpenAI's chat format nests the URL in a mapping.
            found += [image["url"] if isinstance(image, Mapping) and "url" in image else image for image in images[:1]]
    return found


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset is a stream, which has no random access."""
    return isinstance(dataset, IterableDataset)


def undecoded(
    dataset: Any, images_of: Callable[[Any], list[ImageLike]] = sample_images
) -> tuple[Any, Callable[[dict[str, Any]], dict[str, Any]] | None]:
    """Returns a view of a ``datasets`` dataset that does not decode media, and a function that decodes a row.

    Rows of the view contain encoded image files. `image_key` needs only these files, so each image is decoded only
    once. A dataset without media, with a format or transform, or from another library is returned unchanged, with
    None. So is every dataset if ``images_of`` is a user's function, which may need decoded images.
    """
    features: Any = getattr(dataset, "features", None)
    if images_of is not sample_images or not hasattr(features, "decode_example"):
        return dataset, None
    streamed = is_stream(dataset)
    # `_formatting` and, below, `_info` are private names of datasets 4.0.0.
    if (dataset._formatting if streamed else dataset.format["type"]) is not None:
        return dataset, None
    stored = (dataset if streamed else dataset.to_iterable_dataset()).decode(False)
    if stored.features == features:
        return dataset, None
    if streamed:
        return stored, features.decode_example
    view = copy.copy(dataset)  # `cast` would write a copy of the dataset if its images are nested
    view._info = dataset._info.copy()
    view._info.features = stored.features
    return view, features.decode_example


def chosen_image(count: int, index: int) -> int:
    """Returns the position of the teacher's image among ``count`` images; ``index`` may be negative and is clamped."""
    return max(0, min(index if index >= 0 else count + index, count - 1))


def load_image(image: ImageLike) -> Image.Image:
    """Decodes an image to RGB; it may be a path, a data URI, encoded bytes, ``{"path", "bytes"}`` or a PIL image.

    Ignores orientation tags, as the loaders of the model's images do. Raises ``ValueError`` if the file
    is missing, corrupt or not an image.
    """
    opened = image if isinstance(image, Image.Image) else BytesIO(_encoded(image))
    try:
        decoded = opened if isinstance(opened, Image.Image) else Image.open(opened)
        if decoded.mode.startswith(("I", "F")):  # Pillow would clip the values of these modes at 255
            values = np.asarray(decoded)
            white = next((w for w in (1, 255) if decoded.mode in "IF" and values.max() <= w), 65535)
            decoded = Image.fromarray((values * (255 / white)).clip(0, 255).astype("uint8"))
        return decoded.convert("RGB")
    except Exception as error:  # PIL's plugins raise errors of many types for broken files
        problem = f"The image {_name(image)} cannot be decoded ({error})"
        raise ValueError(f"{problem}. It is corrupt or not an image; remove its sample from the dataset.") from error


def image_key(image: ImageLike) -> bytes:
    """Computes the key of an image: 16 bytes of the sha256 of its encoded file, independent of the file's name.

    A PIL image has no encoded file. Its key is computed from its RGB pixels and size, and differs from the key of the
    file from which the image was read. Raises ``ValueError`` if the image cannot be read.
    """
    content = image
    if isinstance(image, Image.Image):
        pixels = load_image(image)
        content = b"rgb pixels %d %d\0" % pixels.size + pixels.tobytes()
    return hashlib.sha256(_encoded(content)).digest()[:KEY_BYTES]


def decoded_key(image: ImageLike, file: ImageLike) -> bytes:
    """Computes the key of an image that ``datasets`` decoded, from its stored file.

    Usually this is the key of the file. If the file has an orientation tag, or only ``datasets`` can read it, this is
    the key of the decoded pixels: ``datasets`` applies the tag but ``load_image`` does not, so the images differ.
    """
    if image is file:
        return image_key(file)
    if not (isinstance(file, dict) and (file.get("bytes") is not None or Path(file.get("path") or "").is_file())):
        return image_key(image)
    with Image.open(BytesIO(_encoded(file))) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return image_key(image if turned else file)


def _name(image: ImageLike) -> str:
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", None)
    name = str((image.get("path") if isinstance(image, dict) else path) or "")
    return repr(name if len(name) < 300 else f"{name[:40]}…") if name else f"(a {type(image).__name__} without a path)"


def _encoded(image: ImageLike) -> bytes:
    if isinstance(image, dict):
        path: Any = image.get("path")
        image = path if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str | os.PathLike):
        kind = type(image).__name__
        raise ValueError(f"An image has the type {kind}; give a path, bytes, a dict with either, or a PIL image.")
    if str(image).startswith(("http://", "https://")):
        raise ValueError(f"The image {image!r} is a URL, which each step would fetch; download it and give its path.")
    try:
        if str(image).startswith("data:"):
            return b64decode(str(image).partition(",")[2], validate=True)
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:
        problem = f"The image file {_name(image)} cannot be read ({getattr(error, 'strerror', error)})"
        raise ValueError(f"{problem}. Check the path in the dataset.") from error
