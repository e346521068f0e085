"""The frozen vision encoder whose features say which images are neighbors: its files, its processor, its features.

The teacher's output CLS token is the paper's choice (arXiv 2606.23885, sec. 3). Encoders that have none give the mean
of their patch tokens, which is this project's choice. Register tokens take part in neither.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

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
    return local_folder(name_or_path, KEY, what, weights=weights)


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


# Weights that no feature reads: a checkpoint may lack them.
_UNREAD_WEIGHTS = ("mask_token", "head.", "pooler.")


class TeacherProcessor:
    """Turns PIL images into the pixel tensor that a teacher takes; picklable, and without weights.

    SigLIP2 NaFlex models take a bag of patches of any aspect ratio. Here every image is resized to the square whose
    patch grid is the one that the model's position embeddings were learned on: this project's choice, which gives all
    images of a batch one shape, as with the fixed-resolution encoders.

    Raises:
        ValueError: Its images are of different sizes.
    """

    def __init__(self, info: TeacherInfo) -> None:
        import transformers

        self._processor = transformers.AutoImageProcessor.from_pretrained(info.path)
        self._grid = math.isqrt(info.config.num_patches) if info.family.naflex else None
        # Two shapes of image show whether the processor gives one size to all.
        one, other = (tuple(self(Image.new("RGB", size)).shape[1:]) for size in ((48, 64), (64, 48)))
        if one != other:
            raise ValueError(
                f"{KEY}: the image processor of {info.name} gives images of different sizes ({one}, {other}), "
                'which cannot form a batch. In its preprocessor_config.json set "do_center_crop": true with a '
                '"crop_size", or a "size" with "height" and "width".'
            )
        #: Height and width of what it returns.
        self.pixel_size: tuple[int, int] = (one[0], one[1])
        #: What takes pixels from [0, 1] to the model's range, each ``[3, 1, 1]``.
        self.mean, self.std = normalization(self._processor)

    def __call__(self, image: Image.Image) -> Tensor:
        """Processes one image of any mode, to ``[3, h, w]`` in float32."""
        image = image.convert("RGB")
        if self._grid is None:
            return self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        grid, patch = self._grid, self._processor.patch_size
        image = image.resize((grid * patch, grid * patch), Image.Resampling(self._processor.resample))
        patches = self._processor(images=image, do_resize=False, max_num_patches=grid * grid, return_tensors="pt")
        rows = patches["pixel_values"][0].reshape(grid, grid, patch, patch, 3)
        return rows.permute(4, 0, 2, 1, 3).reshape(3, grid * patch, grid * patch).contiguous()

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Processes images one by one, to ``[B, 3, h, w]`` in float32."""
        return torch.stack([self(image) for image in images])


class VisionTeacher:
    """A frozen vision model with its own image processor.

    It is no `torch.nn.Module`: assigned to a model or trainer it registers no parameters, and `train()` of the
    student does not reach it.

    Attributes:
        fingerprint: Digest of its config, processor settings and weights, see `teacher_fingerprint`.
        dim: Length D of a feature.
    """

    def __init__(self, model: Any, processor: TeacherProcessor, info: TeacherInfo) -> None:
        self._model = model.eval().requires_grad_(False)
        self.processor = processor
        self.info = info
        self.fingerprint = teacher_fingerprint(info.path)
        self.device: torch.device = model.device
        self.dim: int = info.config.hidden_size
        # here: a copy in the step would make the host wait
        self._mean, self._std = processor.mean.to(self.device), processor.std.to(self.device)

    @staticmethod
    def check(name_or_path: str, side: int) -> TeacherInfo:
        """Checks a teacher for an objective on tokens, without loading it.

        Args:
            name_or_path: A folder or a hub id.
            side: Tokens along each side of the student's grid.

        Raises:
            ValueError: It cannot be used, or its patches do not match the student's tokens.
        """
        info = check_teacher(name_or_path)
        check_grid(info, side)
        return info

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "VisionTeacher":
        """Loads a teacher from a folder or a hub id; every rank gets a whole copy, also under ZeRO-3 and FSDP.

        Args:
            name_or_path: A folder or a hub id, of a model type in `checkpoint.FAMILIES`.
            device: Default: the current CUDA device, else the CPU.
            dtype: Of weights and computation, whatever the checkpoint is stored in. bfloat16 halves the memory and
                changes a few near-tied neighbors.

        Raises:
            ValueError: The teacher cannot be used (see `check_teacher`), lacks weights, or its processor's image size
                is not the one that its position embeddings are for.
        """
        info = check_teacher(name_or_path)
        with loading(info.name):
            processor = TeacherProcessor(info)
            if not info.family.any_size:
                size = info.config.image_size
                expected = (size, size) if isinstance(size, int) else tuple(size)
                if processor.pixel_size != expected:
                    raise ValueError(
                        f"{KEY}: the image processor of {info.name} gives images of {processor.pixel_size} pixels, "
                        f"its model takes {expected}. Use the preprocessor_config.json that belongs to the model."
                    )
            model = _load_model(info, dtype)
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor, info)

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
    def patch_features(self, images: Tensor, side: int) -> Tensor:
        """The output's patch tokens on the student's grid (CLIP's before its final norm), otherwise as `encode`.

        Args:
            images: ``[B, 3, S, S]`` in [0, 1], as the student sees them.
            side: Tokens along a side of the student's grid, which becomes the grid of patches.

        Returns:
            ``[B, side * side, D]``, row by row.
        """
        size = side * self._model.config.patch_size
        images = nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        # whatever else there is (CLS, registers) comes first
        return self._forward((images - self._mean) / self._std).last_hidden_state.float()[:, -side * side :]

    def _forward(self, pixel_values: Tensor) -> Any:
        if self._model.training:
            self._model.eval()
        pixel_values = pixel_values.to(self.device, self._model.dtype)
        # The training step's autocast must not reach in here: features would depend on where they were computed.
        with torch.autocast(self.device.type, enabled=False):
            if self.info.family.naflex:
                return self._model(**_patch_inputs(pixel_values, self._model.config.patch_size))
            return self._model(pixel_values)


def normalization(image_processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[3, 1, 1]`` by which an image processor normalizes pixels in [0, 1]."""
    mean, std = [0.0] * 3, [1.0] * 3
    if image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


def check_grid(info: TeacherInfo, side: int) -> None:
    """Refuses a teacher of fixed size whose patches do not lie where the student's tokens do."""
    if info.family.any_size:
        return
    size, patch = info.config.image_size, info.config.patch_size
    size = size if isinstance(size, int) else size[0]
    if size // patch != side:
        raise ValueError(
            f"{KEY}: {info.name} takes images of {size} pixels only, {size // patch} x {size // patch} patches, and "
            f"the model's images are {side} x {side} tokens; use a teacher that takes any size, such as "
            "facebook/dinov2-large."
        )


def _patch_inputs(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """Cuts ``[B, 3, h, w]`` into the N patches that a NaFlex model takes, in ``[B, N, patch * patch * 3]``."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    device = pixel_values.device
    return {
        "pixel_values": patches.reshape(batch, rows * columns, patch * patch * channels),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int32, device=device),
        "spatial_shapes": torch.stack([torch.full((batch,), n, device=device) for n in (rows, columns)], dim=1),
    }


def _load_model(info: TeacherInfo, dtype: torch.dtype) -> Any:
    import transformers

    model_class = getattr(transformers, info.family.model_class)
    options: dict[str, Any] = {}
    if info.family.output == "mean":
        info.config.vision_use_head = False  # the attention-pooling head of SigLIP is not what is read
    if info.config.model_type == "vit":
        options["add_pooling_layer"] = False
    verbosity = transformers.logging.get_verbosity()
    # The loading report lists the text half of CLIP and SigLIP checkpoints as unexpected, a page of it.
    transformers.logging.set_verbosity_error()
    try:
        with whole_model_on_every_rank():
            model, loading = model_class.from_pretrained(
                info.path, config=info.config, dtype=dtype, output_loading_info=True, **options
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in _UNREAD_WEIGHTS))
    if missing:
        raise ValueError(
            f"{KEY}: the weights of {info.name} lack {len(missing)} tensors of a {info.family.model_class}, first "
            f"{missing[0]}. Its config.json and weights do not belong together: copy or download it again."
        )
    return model


@contextmanager
def whole_model_on_every_rank() -> Iterator[None]:
    """Loads models that no engine will hold: ZeRO-3 would partition them, and FSDP leave all ranks but one empty."""
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
