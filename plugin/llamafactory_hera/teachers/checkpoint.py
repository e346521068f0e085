"""A teacher's files: which models can be one, the check of a folder or hub id, and a fingerprint of what it holds.

The teacher's output CLS token is the paper's choice (arXiv 2606.23885, sec. 3). Encoders that have none give the mean
of their patch tokens, which is this project's choice. Register tokens take part in neither.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..files import read_json
from ..hub import CONFIG_FILE, local_folder, weight_files

KEY = "hera_teacher"
VISION_MODEL = "a vision model such as facebook/dinov2-large"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# Raise this when the feature that is taken from the same files changes: caches of the old one must not be read.
_FEATURE_VERSION = 1
_LARGEST = 4096  # pixels along a side: one image more would fill the memory
_HASH_BLOCK = 16 * 2**20
# What saving or copying a model changes without changing what it computes.
_INCIDENTAL_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "_diffusers_version")


@dataclass(frozen=True)
class TeacherFamily:
    """How one `model_type` of a `config.json` is loaded and read."""

    #: Name of the transformers class of the vision model alone.
    model_class: str
    #: The feature: ``cls``, the first token of ``last_hidden_state``; ``pooled``, CLIP's ``pooler_output``, the only
    #: place where its final norm is applied; ``mean`` of ``last_hidden_state``, whose tokens are patches only.
    output: Literal["cls", "pooled", "mean"]
    #: It takes images of other sizes than `config.image_size`.
    any_size: bool = False
    #: It takes patches with their grid shape, not images (SigLIP2 NaFlex).
    naflex: bool = False


# The fixed-resolution SigLIP2 checkpoints call themselves "siglip"; "siglip2" is the NaFlex variant.
FAMILIES: dict[str, TeacherFamily] = {
    "dinov2": TeacherFamily("Dinov2Model", "cls", any_size=True),
    "dinov2_with_registers": TeacherFamily("Dinov2WithRegistersModel", "cls", any_size=True),
    "dinov3_vit": TeacherFamily("DINOv3ViTModel", "cls", any_size=True),
    "vit": TeacherFamily("ViTModel", "cls"),
    "clip": TeacherFamily("CLIPVisionModel", "pooled"),
    "clip_vision_model": TeacherFamily("CLIPVisionModel", "pooled"),
    "siglip": TeacherFamily("SiglipVisionModel", "mean"),
    "siglip_vision_model": TeacherFamily("SiglipVisionModel", "mean"),
    "siglip2": TeacherFamily("Siglip2VisionModel", "mean", any_size=True, naflex=True),
    "siglip2_vision_model": TeacherFamily("Siglip2VisionModel", "mean", any_size=True, naflex=True),
}


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher's config files say: the transformers config of the vision model alone; the name as given."""

    family: TeacherFamily
    config: Any
    path: Path
    name: str


def teacher_folder(name_or_path: str, weights: bool = True, what: str = VISION_MODEL) -> Path:
    """The local folder with a teacher's files, fetched when it is a hub id; see `hub.local_folder`."""
    return local_folder(name_or_path, KEY, what, patterns=PROCESSOR_FILES, weights=weights)


def whole_teacher_folder(value: str, what: str = VISION_MODEL) -> Path:
    """The folder with its weights.

    Raises:
        ValueError: They are not there or not whole.
    """
    folder = teacher_folder(value, what=what)
    try:
        weight_files(folder)
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}. Copy or download the teacher {value} again, whole.") from error
    return folder


def check_teacher(name_or_path: str) -> TeacherInfo:
    """Checks that a folder or hub id holds a vision model, its image processor and whole weights; loads none.

    Raises:
        ValueError: It does not, or the hub is out of reach; names the key, the value and the remedy.
    """
    value = str(name_or_path)
    folder = teacher_folder(value, weights=False)
    try:
        model_type = read_json(folder / CONFIG_FILE).get("model_type")
        processor = _processor_config(folder)
        sizes = [size for key in ("size", "crop_size") for size in _numbers((processor or {}).get(key))]
        if not all(0 < size <= _LARGEST for size in sizes):
            raise ValueError(f"its image processor asks for images of {sizes} pixels, not 1 to {_LARGEST}")
    except (ValueError, AttributeError) as error:  # the latter where it holds no JSON object
        raise ValueError(f"{KEY}: {error}. Copy or download the teacher {value} again, whole.") from error
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"{KEY}: {value} is not a vision model that can be the teacher (its model_type is {model_type!r}). Give "
            f"one of these: {', '.join(sorted(FAMILIES))}; the paper's is facebook/dinov2-large."
        )
    if processor is None:
        raise ValueError(
            f"{KEY}: {value} holds no image processor ({' or '.join(PROCESSOR_FILES)}). Put the one of the same "
            "model there: the teacher must see images as it did in its training."
        )
    import transformers

    family = FAMILIES[model_type]
    # Hub configs leave out what equals the default, so the config class has to fill it in.
    with loading(value):
        config = getattr(transformers, family.model_class).config_class.from_pretrained(folder)
    return TeacherInfo(family, config, whole_teacher_folder(value), value)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Names the teacher where its files hold what no model can be made of: each class has errors of its own."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(KEY) or "OutOfMemory" in type(error).__name__:
            raise
        why = " ".join(str(error).split()).partition(". ")[0][:200]
        raise ValueError(f"{KEY}: {name} cannot be loaded ({why}). Copy or download it again, whole.") from error


def _numbers(value: Any) -> list[float]:
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [number for number in held if isinstance(number, int | float)]


def _processor_config(folder: Path) -> dict[str, Any] | None:
    """The image processor's settings, also where they are kept inside a processor of text and images."""
    alone, inside = (folder / name for name in PROCESSOR_FILES)
    if alone.is_file():
        return read_json(alone)
    return read_json(inside).get("image_processor") if inside.is_file() else None


def teacher_fingerprint(folder: str | Path) -> str:
    """A digest, 64 hexadecimal digits, of everything in a teacher's files that decides its features.

    It covers ``config.json`` and the image processor's settings (parsed, without the keys that saving adds), every
    byte and name of the weight files, and which output is the feature; not library versions, dtype and device. Of an
    autoencoder there are only configuration and weights.
    """
    folder = Path(folder)
    weights = weight_files(folder)
    config = read_json(folder / CONFIG_FILE)
    family = FAMILIES.get(config.get("model_type", ""))
    described = {
        "version": _FEATURE_VERSION,
        "output": family.output if family else None,
        "config": _without_incidentals(config),
        "processor": _without_incidentals(_processor_config(folder)),
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for file in weights:
        stat = file.stat()
        digest.update(file.name.encode() + b"\0" + _file_digest(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


def _without_incidentals(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_incidentals(item) for key, item in value.items() if key not in _INCIDENTAL_KEYS}
    return value


@lru_cache(maxsize=64)
def _file_digest(path: Path, _size: int, _mtime_ns: int) -> bytes:
    # A digest of the blocks' digests, which caches and checkpoints hold: `hashlib.file_digest` would give another one.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(hashlib.sha256(block).digest())
    return digest.digest()
