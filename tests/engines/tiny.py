"""A tiny LLaVA (Qwen3 text, SigLIP vision) for every tuning type, and global batches for two ranks."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from llamafactory.model.model_utils.checkpointing import _gradient_checkpointing_enable
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from llamafactory_hera.teachers.images import KEY_BYTES
from llamafactory_hera.training.collator import NO_IMAGE, PIXELS
from tests.tiny_models import PAD, TEACHER_SIZE, TEXT_CONFIGS

HEADS = "L1H3,L2H0,L2H2"
HEAD_DIM = 16
HIDDEN = 32
K = 3
RANKS = 2
PER_RANK = 4
IMAGE_TOKEN = 63
N_PATCHES, ANSWER, PROMPT = 4, 4, 3

TUNINGS = ("full", "lora", "dora", "qlora", "freeze", "projector")
CHECKPOINTING = ("off", "reentrant", "non-reentrant")
ENGINE_NAMES = ("DDP", "DDP, static", "ZeRO-2", "ZeRO-3", "FSDP1", "FSDP2")
DATA = ("images", "one rank without", "text only")


def _new_model() -> LlavaForConditionalGeneration:
    # The model has attention_bias, because HeRA must subtract the bias of o_proj. head_dim is not hidden_size / heads.
    shape = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": HEAD_DIM}
    text = TEXT_CONFIGS["qwen3"](**shape, attention_bias=True, tie_word_embeddings=False, use_cache=False)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # the usual initialization is too small to tell a wrong gradient from rounding
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "embed" in name else parameter.shape[-1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
    return model


@cache
def _saved_model() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="tiny_llava_")
    _new_model().save_pretrained(folder.name)
    return folder


def _quantized_model() -> LlavaForConditionalGeneration:
    # the host sets the storage to the compute type, for FSDP
    types = dict.fromkeys(("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"), torch.float32)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **types)
    return LlavaForConditionalGeneration.from_pretrained(
        _saved_model().name, quantization_config=quantization, dtype=torch.float32, attn_implementation="sdpa"
    )


def _with_adapter(model: nn.Module, tuning: str, dropout: float) -> nn.Module:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        use_dora=tuning == "dora",
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        # the host also quantizes the projector, and 4-bit weights cannot be trained
        modules_to_save=None if tuning == "qlora" else ["multi_modal_projector"],
    )
    torch.manual_seed(2)
    model = get_peft_model(model, config)
    with torch.no_grad():  # LoRA's B starts at zero, so A would receive no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def build(tuning: str, checkpointing: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Prepares a model as the host does, with the same weights on every rank; ``dropout`` is the adapter's."""
    model = _quantized_model() if tuning == "qlora" else _new_model()
    model.config.use_cache = False
    model.requires_grad_(False)
    if checkpointing != "off":
        model.enable_input_require_grads()
        enable: Callable[..., None] = partial(_gradient_checkpointing_enable, model)
        enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"})
        assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    if tuning in ("lora", "dora", "qlora"):
        model = _with_adapter(model, tuning, dropout)
    elif tuning == "full":
        model.model.language_model.requires_grad_(True)
        model.model.multi_modal_projector.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif tuning == "freeze":
        for layer in model.model.language_model.layers[1:]:
            layer.requires_grad_(True)
    else:
        model.model.multi_modal_projector.requires_grad_(True)
    return model.train() if tuning == "qlora" else model.train().to(dtype)


@dataclass(frozen=True)
class Batch:
    """Inputs of the model, and the inputs that the collator adds for the teacher."""

    inputs: dict[str, Tensor]
    teacher: dict[str, Tensor]


def _row(generator: torch.Generator, with_image: bool) -> tuple[list[int], list[int]]:
    def words(n: int) -> list[int]:
        return torch.randint(1, 60, (n,), generator=generator).tolist()

    length = int(torch.randint(0, 4, (), generator=generator))
    prompt = [IMAGE_TOKEN] * (N_PATCHES * with_image) + words(PROMPT + length)
    answer = words(ANSWER)  # all answers are equally long, so the mean of the ranks' losses is the mean over the batch
    return prompt + answer, [-100] * len(prompt) + answer


def _batch(rows: list[tuple[list[int], list[int]]], images: Tensor, pixels: Tensor, dummy: Tensor | None) -> Batch:
    """Pads on the right; like the host, adds a masked dummy image to sample 0 if the batch has no image."""
    attended = [[1] * len(ids) for ids, _ in rows]
    rows = [(list(ids), list(labels)) for ids, labels in rows]
    if dummy is not None:
        rows[0][0].extend([IMAGE_TOKEN] * N_PATCHES)
        rows[0][1].extend([-100] * N_PATCHES)
        attended[0] = attended[0] + [0] * N_PATCHES
        images = dummy
    width = max(len(ids) for ids, _ in rows)

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in lists])

    inputs: dict[str, Any] = {
        "input_ids": padded([ids for ids, _ in rows], PAD),
        "labels": padded([labels for _, labels in rows], -100),
        "attention_mask": padded(attended, 0),
    }
    if len(images):
        inputs["pixel_values"] = images
    has_image = torch.tensor([bool(ids.count(IMAGE_TOKEN)) and dummy is None for ids, _ in rows])
    teacher = {
        "hera_source": torch.where(has_image, PIXELS, NO_IMAGE),
        "hera_keys": torch.zeros(len(rows), KEY_BYTES, dtype=torch.uint8),
        "hera_image": torch.stack([torch.zeros_like(has_image), has_image], dim=1).long(),
    }
    if has_image.any():
        teacher |= {"hera_pixels": pixels, "hera_rows": has_image.nonzero()[:, 0]}
    return Batch(inputs, teacher)


def _packed(batch: Batch) -> Batch:
    """Joins the samples of a batch in one row, with a mask that keeps them from attending to each other."""
    kept = batch.inputs["attention_mask"].bool()
    number, positions = kept.nonzero().T
    seen = (number == number.unsqueeze(1)) & torch.ones(len(number), len(number)).tril().bool()
    inputs = {name: batch.inputs[name][kept].unsqueeze(0) for name in ("input_ids", "labels")}
    inputs |= {"attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]}
    inputs |= {"position_ids": positions.unsqueeze(0), "pixel_values": batch.inputs["pixel_values"]}
    return Batch(inputs, batch.teacher | {"hera_pieces": number.unsqueeze(0) + 1})


def batches(data: str, n_micro: int = 1) -> tuple[Batch, list[Batch]]:
    """Returns the global batch and its parts, ``n_micro`` for each rank, ordered by rank."""
    generator = torch.Generator().manual_seed(3)
    n = RANKS * PER_RANK  # with "uneven" and "packed", the first rank has 5 samples and the second has 3
    n_images = {"images": n, "one rank without": PER_RANK, "text only": 0, "uneven": n, "packed": n - 1}[data]
    bounds = [0, 3, 5, 6, n][:: 3 - n_micro] if data in ("uneven", "packed") else range(0, n + 1, PER_RANK // n_micro)
    rows = [_row(generator, with_image=i < n_images) for i in range(n)]
    images = torch.randn(n_images, 3, 16, 16, generator=generator)
    dummy = torch.ones(1, 3, 16, 16)
    pixels = torch.randn(n, 3, TEACHER_SIZE, TEACHER_SIZE, generator=generator)
    parts = []
    for start, stop in pairwise(bounds):
        part = slice(start, stop)
        batch = _batch(rows[part], images[part], pixels[part], dummy if start >= n_images else None)
        parts.append(_packed(batch) if data == "packed" else batch)
    return _batch(rows, images, pixels, dummy if n_images == 0 else None), parts
