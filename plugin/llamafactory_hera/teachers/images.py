"""Images as datasets hold them: those of a sample, the one that stands for it, pixels, and a key of the content."""

import copy
import hashlib
import os
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile
from torch.utils.data import IterableDataset

ImageLike = str | os.PathLike | bytes | dict[str, Any] | BinaryIO | Image.Image

KEY_BYTES = 16

#: Columns of a dataset in which `sample_images` looks.
IMAGE_COLUMNS = ("images", "image", "messages", "prompt", "completion")
# Of an image part of a chat message: where its image may stand, in the order in which it is looked for.
_PART_KEYS = ("image", "path", "url", "image_url")


def sample_images(row: Mapping[str, Any]) -> list[ImageLike]:
    """The images of a dataset's row, in their order; empty when it has none.

    They stand in its column ``images`` or ``image``, or else as image parts in the chat messages of ``messages``, or
    of ``prompt`` and ``completion``.
    """
    for column in ("images", "image"):
        held = row.get(column)
        found = [image for image in (held if isinstance(held, list | tuple) else [held]) if image is not None]
        if found:
            return found
    for columns in (("messages",), ("prompt", "completion")):
        found = [image for column in columns for image in _message_images(row.get(column))]
        if found:
            return found
    return []


def images_by(images_of: Callable[[Any], list[ImageLike]], row: Any) -> list[ImageLike]:
    """What a custom function says are a row's images.

    Raises:
        ValueError: It gives no list.
    """
    images = images_of(row)
    if not isinstance(images, list | tuple):
        raise ValueError(f"images_of returned {type(images).__name__}; expected a list of images, [] for none.")
    return list(images)


def _message_images(messages: Any) -> list[ImageLike]:
    contents = [message.get("content") for message in messages] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    found: list[Any] = []
    for part in parts:
        if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            image = next((part[key] for key in _PART_KEYS if part.get(key) is not None), None)
            # a mapping with its URL in the chat format of OpenAI
            found.append(image["url"] if isinstance(image, Mapping) and "url" in image else image)
    return [image for image in found if image is not None]


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is only read in its order, as a DataLoader tells it; it may know its length all the same."""
    return isinstance(dataset, IterableDataset)


def undecoded(dataset: Any) -> tuple[Any, Callable[[dict[str, Any]], dict[str, Any]] | None]:
    """A view of a dataset of the library ``datasets`` whose media stay as they are stored, and what decodes a row.

    So an image has the key of its file, and is decoded once. Everything else is given back as it is, with None: other
    datasets, those without media, and those whose rows a format or a custom transform makes.
    """
    features = getattr(dataset, "features", None)
    if not isinstance(features, Mapping) or not hasattr(features, "decode_example"):
        return dataset, None
    streamed = is_stream(dataset)
    formatted = dataset._formatting if streamed else dataset.format["type"]
    stored = _undecoded(features)
    if formatted is not None or stored == features:
        return dataset, None
    if streamed:
        return dataset.cast(stored), features.decode_example
    view = copy.copy(dataset)  # `cast` would write the whole dataset anew where images are nested
    view._info = dataset._info.copy()
    view._info.features = stored
    return view, features.decode_example


def _undecoded(feature: Any) -> Any:
    """A feature of ``datasets`` with ``decode=False`` in every image, video, sound and PDF, however deep."""
    if isinstance(feature, Mapping):
        return type(feature)({name: _undecoded(inner) for name, inner in feature.items()})  # type: ignore[call-arg]
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if getattr(feature, "decode", False):
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


def shown_image(count: int, index: int) -> int:
    """Which of a sample's images stands for it: ``index``, negative from the end, clamped to what there is."""
    return max(0, min(index if index >= 0 else count + index, count - 1))


def load_image(image: ImageLike) -> Image.Image:
    """Decodes an image given as path, data URI, encoded bytes, ``{"path", "bytes"}``, file object or PIL, to RGB.

    Orientation tags are not applied: the host does not apply them either, and teacher and model must see the same
    picture.

    Raises:
        ValueError: Names the file when it is missing, corrupt or not an image.
    """
    source = image if isinstance(image, Image.Image) else BytesIO(_encoded(image))
    # packages such as lmms-eval switch it on when they are imported: half an image would be taken for a whole one
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        if opened.mode.startswith("I;16"):  # `convert` cuts off what 8 bits do not hold
            opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        return opened.convert("RGB")
    except Exception as error:  # PIL's plugins raise errors of many kinds on broken files
        raise ValueError(
            f"The image {_name(image)} cannot be decoded ({error}). It is corrupt or not an image: replace it or "
            "remove its sample from the dataset."
        ) from error


def image_key(image: ImageLike) -> bytes:
    """A content digest: sha256 of the encoded file, cut to 16 bytes.

    The same file has the same key under any name, as path, bytes, ``{"path", "bytes"}`` or file object. A PIL image
    has no encoded form: its key is that of its RGB pixels and size, which differs from the key of the file that it
    was read from, so its features are computed and cached apart.

    Raises:
        ValueError: Names the file when it cannot be read, or when a PIL image's own file cannot be decoded.
    """
    content = image
    if isinstance(image, Image.Image):
        pixels = load_image(image)
        content = b"rgb pixels %d %d\0" % pixels.size + pixels.tobytes()
    return hashlib.sha256(_encoded(content)).digest()[:KEY_BYTES]


def decoded_key(image: ImageLike, file: ImageLike) -> bytes:
    """The key of an image as ``datasets`` decoded it, by the file that it was stored as.

    It is the file's, unless that cannot be read without the library, or holds an orientation tag: the library turns
    such a picture, :func:`load_image` does not, and the two must not share a feature.
    """
    if image is file:
        return image_key(file)
    stored = isinstance(file, dict) and (file.get("bytes") is not None or Path(file.get("path") or "").is_file())
    if not stored:
        return image_key(image)
    with Image.open(BytesIO(_encoded(file))) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return image_key(image if turned else file)


def _name(image: ImageLike) -> str:
    path = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", getattr(image, "name", None))
    name = str((image.get("path") if isinstance(image, dict) else path) or "")
    if name.startswith("data:") or len(name) > 1000:  # or base64 alone
        name = f"{name[:40]}…"
    return repr(name) if name else f"given as {type(image).__name__} without a path"


def _encoded(image: ImageLike) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict) and image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str) and path.startswith("data:"):
        try:
            return b64decode(path.partition(",")[2], validate=True)
        except Base64Error as error:
            message = f"The image {_name(path)} is not valid base64 ({error}); fix or remove its sample."
            raise ValueError(message) from error
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise ValueError(f"The image {path!r} is a URL, which every step would fetch; download it, and give its path.")
    if isinstance(path, str | os.PathLike):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ValueError(
                f"The image file {_name(path)} cannot be read ({error.strerror or error}). Check the path in "
                "the dataset and `media_dir`."
            ) from error
    if isinstance(image, dict) or not hasattr(image, "seek"):
        raise ValueError(
            f"An image is given as {type(image).__name__}; it must be a path, bytes, a dict with 'path' or 'bytes', a "
            "file object or a PIL image."
        )
    file: Any = image  # whoever owns it reads it again: its position stays as it was
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content
