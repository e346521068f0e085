"""The teacher, a frozen vision encoder: its files, its image processor and its features.

The feature of an image is the CLS token of the encoder's output (arXiv 2606.23885, sec. 3). For an encoder without a
CLS token, it is the mean of the patch tokens; for a timm model, it is the pooled output.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..files import read_json
from ..hub import CONFIG_FILE, local_folder, weight_files

KEY = "hera_teacher"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

# No feature depends on these weights, so a checkpoint may lack them.
_UNUSED_WEIGHTS = ("mask_token", "head.", "pooler.")


class TeacherFamily(NamedTuple):
    """The transformers class for models of one ``model_type``, and the output that serves as the feature."""

    model_class: str
    #: The first token of ``last_hidden_state``, ``pooler_output``, or the mean of all tokens. CLIP applies its final
    #: norm only to ``pooler_output``.
    output: Literal["cls", "pooled", "mean"]
    any_size: bool = False  #: The model accepts image sizes other than ``config.image_size``.
    patches: bool = True  #: ``last_hidden_state`` ends with the patch tokens, row by row.


TIMM = "timm_wrapper"

# "siglip" includes SigLIP2 of fixed resolution. The type "siglip2" is NaFlex, which expects lists of patches instead.
FAMILIES: dict[str, TeacherFamily] = {
    "dinov2": TeacherFamily("Dinov2Model", "cls", any_size=True),
    "dinov2_with_registers": TeacherFamily("Dinov2WithRegistersModel", "cls", any_size=True),
    "dinov3_vit": TeacherFamily("DINOv3ViTModel", "cls", any_size=True),
    "dinov3_convnext": TeacherFamily("DINOv3ConvNextModel", "pooled", patches=False),
    "vit": TeacherFamily("ViTModel", "cls"),
    "vit_msn": TeacherFamily("ViTMSNModel", "cls"),
    "pixio": TeacherFamily("PixioModel", "pooled"),
    "clip": TeacherFamily("CLIPVisionModel", "pooled"),
    "clip_vision_model": TeacherFamily("CLIPVisionModel", "pooled"),
    "metaclip_2": TeacherFamily("MetaClip2VisionModel", "pooled"),
    "mlcd": TeacherFamily("MLCDVisionModel", "pooled", any_size=True),
    "mlcd_vision_model": TeacherFamily("MLCDVisionModel", "pooled", any_size=True),
    "siglip": TeacherFamily("SiglipVisionModel", "mean"),
    "siglip_vision_model": TeacherFamily("SiglipVisionModel", "mean"),
    "aimv2_vision_model": TeacherFamily("Aimv2VisionModel", "mean"),
    "ijepa": TeacherFamily("IJepaModel", "mean"),
    TIMM: TeacherFamily("TimmWrapperModel", "pooled"),
}


class TeacherInfo(NamedTuple):
    """A teacher's family, the config of its vision model, its folder, and its name in the settings."""

    family: TeacherFamily
    config: Any
    path: Path
    name: str


def teacher_folder(
    name_or_path: str, weights: bool = True, what: str = "a vision model such as facebook/dinov2-large"
) -> Path:
    """Returns a teacher's local folder, fetched from the hub if needed; raises ``ValueError`` if files are missing."""
    folder = local_folder(name_or_path, KEY, what, weights=weights)
    if weights:
        try:
            weight_files(folder)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}. Copy or download {name_or_path} again.") from error
    return folder


def teacher_fingerprint(folder: str | Path) -> str:
    """Returns a hash of all files that determine a teacher's features: weights, config and image processor."""
    settings = (Path(folder) / name for name in (CONFIG_FILE, *PROCESSOR_FILES))
    digest = hashlib.sha256()
    for path in [*(path for path in settings if path.is_file()), *weight_files(Path(folder))]:
        with path.open("rb") as file:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


class TeacherProcessor:
    """Converts PIL images to the teacher's input; a processor can be pickled."""

    def __init__(self, info: TeacherInfo) -> None:
        import transformers

        processor = self._processor = transformers.AutoImageProcessor.from_pretrained(info.path)
        self.pixel_size: tuple[int, int]  #: Height and width of the result.
        self.mean, self.std = normalization(processor)
        if hasattr(processor, "data_config"):
            self.pixel_size = processor.data_config["input_size"][1:]
            return
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        if not (size and size.height and size.width):
            problem = f"the image processor of {info.name} produces images of different sizes"
            raise ValueError(f'{KEY}: {problem}; set "do_center_crop": true and "crop_size" in its JSON file.')
        self.pixel_size = (size.height, size.width)

    def __call__(self, image: Image.Image) -> Tensor:
        """Converts one image of any mode into ``[3, h, w]`` in float32."""
        return self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Converts images, one by one, into ``[B, 3, h, w]`` in float32."""
        return torch.stack([self(image) for image in images])


class VisionTeacher:
    """A frozen vision model; not a ``torch.nn.Module``, so a model that contains it neither trains nor saves it."""

    def __init__(self, model: Any, processor: TeacherProcessor, info: TeacherInfo) -> None:
        self._model = model.eval().requires_grad_(False)
        self.processor, self.info = processor, info
        self.fingerprint = teacher_fingerprint(info.path)
        self.device: torch.device = model.device
        #: The length D of a feature.
        self.dim: int = getattr(info.config, "hidden_size", None) or info.config.hidden_sizes[-1]
        # copied once, because a copy in each step would make the CPU wait
        self._mean, self._std = processor.mean.to(self.device), processor.std.to(self.device)

    @staticmethod
    def check(name_or_path: str, side: int | None = None) -> TeacherInfo:
        """Checks a teacher's files without loading weights; patches must fit a grid with ``side`` tokens per side."""
        import transformers

        value = str(name_or_path)
        folder = teacher_folder(value, weights=False)
        settings = read_json(folder / CONFIG_FILE)
        # A config written by timm names no type, but contains the settings of the image processor.
        model_type = settings.get("model_type", TIMM if "pretrained_cfg" in settings else None)
        if model_type not in FAMILIES:
            problem = f"{value} has model_type {model_type!r}"
            raise ValueError(f"{KEY}: {problem}; give a vision model of one of the types {', '.join(FAMILIES)}.")
        if model_type != TIMM and not any((folder / name).is_file() for name in PROCESSOR_FILES):
            problem = f"{value} contains no image processor ({' or '.join(PROCESSOR_FILES)})"
            raise ValueError(f"{KEY}: {problem}; add that file from the same model.")
        family = FAMILIES[model_type]
        if model_type == TIMM and not transformers.utils.is_timm_available():
            raise ValueError(f"{KEY}: {value} needs timm, which is not installed; pip install timm.")
        # The config class adds defaults that config files on the hub omit, and extracts the vision part of CLIP.
        config = getattr(transformers, family.model_class).config_class.from_pretrained(folder)
        if model_type == TIMM:
            family = _timm_family(family, config, value)
        if side is not None and not family.patches:
            raise ValueError(f"{KEY}: {value} has no square grid of patch tokens; use facebook/dinov2-large.")
        if side is not None and not family.any_size and config.image_size // config.patch_size != side:
            fixed = f"{value} accepts only images of {config.image_size} pixels in patches of {config.patch_size}"
            grid = f"the student's images are {side} x {side} tokens"
            raise ValueError(f"{KEY}: {fixed}, but {grid}; use facebook/dinov2-large, which accepts any size.")
        return TeacherInfo(family, config, teacher_folder(value), value)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "VisionTeacher":
        """Loads a teacher from a folder or hub id; every process has a complete copy, even under ZeRO-3 and FSDP.

        The default device is the current CUDA device, or else the CPU. In bfloat16, a few neighbors with nearly equal
        similarities change places.
        """
        import transformers

        info = cls.check(name_or_path)
        processor = TeacherProcessor(info)
        options: dict[str, Any] = {}
        if info.config.model_type in ("vit", "ijepa"):
            options["add_pooling_layer"] = False
        # the pooling modules of SigLIP and AIMv2, which no feature uses
        info.config.vision_use_head = info.config.use_head = False
        with whole_model_on_every_rank():
            model, loading = getattr(transformers, info.family.model_class).from_pretrained(
                info.path, config=info.config, dtype=dtype, output_loading_info=True, **options
            )
        # transformers only warns about missing weights and initializes them randomly.
        missing = sorted(name for name in loading["missing_keys"] if not any(part in name for part in _UNUSED_WEIGHTS))
        if missing:
            lack = f"{len(missing)} tensors of a {info.family.model_class}, the first being {missing[0]}"
            raise ValueError(f"{KEY}: the weights of {info.name} lack {lack}; copy or download the model again.")
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor, info)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Computes features ``[B, D]`` of preprocessed images ``[B, 3, h, w]``, in float32 on the teacher's device."""
        output, kind = self._forward(pixel_values), self.info.family.output
        if kind == "pooled":
            return output.pooler_output.float()
        tokens = output.last_hidden_state.float()
        return tokens[:, 0] if kind == "cls" else tokens.mean(dim=1)

    @torch.no_grad()
    def patch_features(self, images: Tensor, side: int) -> Tensor:
        """Computes the output's patch tokens (for CLIP, before its final norm) on a grid of ``side * side`` tokens.

        ``images`` are ``[B, 3, S, S]`` in [0, 1]; the result is ``[B, side * side, D]`` in float32, row by row.
        """
        size = side * self._model.config.patch_size
        images = nn.functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
        # CLS and register tokens come before the patches.
        return self._forward((images - self._mean) / self._std).last_hidden_state.float()[:, -side * side :]

    def _forward(self, pixel_values: Tensor) -> Any:
        # Features must be equal inside and outside a training step, so dropout and autocast are off.
        self._model.eval()
        with torch.autocast(self.device.type, enabled=False):
            return self._model(pixel_values.to(self.device, self._model.dtype))


def _timm_family(family: TeacherFamily, config: Any, name: str) -> TeacherFamily:
    """Runs a timm model without weights and adds the missing sizes to its config."""
    from transformers import TimmWrapperModel

    config.do_pooling = True
    # timm stores all arguments, but transformers passes the number of classes itself
    config.model_args = {key: value for key, value in (config.model_args or {}).items() if key != "num_classes"}
    try:
        with torch.device("meta"), torch.no_grad():
            wrapper = TimmWrapperModel(config).eval()
            model, (_, *image) = wrapper.timm_model, config.pretrained_cfg["input_size"]
            output = wrapper(torch.empty(1, 3, *image))
        tokens, config.hidden_size = output.last_hidden_state, output.pooler_output.shape[-1]
    except Exception as error:  # timm's models raise errors of many types
        raise ValueError(f"{KEY}: timm cannot pool the features of {name} ({error}); use another model.") from error
    n_prefix, config.image_size = getattr(model, "num_prefix_tokens", None), image[0]
    if n_prefix is None or getattr(tokens, "ndim", 0) != 3 or tokens.shape[2] != config.hidden_size:
        return family._replace(patches=False)
    side = math.isqrt(tokens.shape[1] - n_prefix)
    config.patch_size = image[0] // max(side, 1)
    any_size = hasattr(model, "dynamic_img_size")
    if any_size:
        config.model_args["dynamic_img_size"] = True
    return family._replace(any_size=any_size, patches=image[0] == image[1] and n_prefix + side**2 == tokens.shape[1])


def normalization(image_processor: Any) -> tuple[Tensor, Tensor]:
    """Returns the mean and standard deviation, ``[3, 1, 1]``, that a processor uses for pixels in [0, 1]."""
    mean, std = [0.0] * 3, [1.0] * 3
    if data := getattr(image_processor, "data_config", None):  # the processor of a timm model
        mean, std = data["mean"], data["std"]
    elif image_processor.do_normalize:
        mean, std = image_processor.image_mean, image_processor.image_std
    return torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)


@contextmanager
def whole_model_on_every_rank() -> Iterator[None]:
    """Keeps the engine from loading models: ZeRO-3 would partition them, and FSDP would load them on one rank only."""
    from transformers.integrations import deepspeed

    # A private name, as of transformers 5.5.4: `from_pretrained` recognizes ZeRO-3 by it.
    reference = deepspeed._hf_deepspeed_config_weak_ref
    efficient_loading = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
        if efficient_loading is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient_loading
