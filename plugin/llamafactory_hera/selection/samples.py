"""The input of a selection: a dataset, the samples that a seed draws from it, and captions as token ids."""

import logging
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import nn

from ..alignment.neighbors import chance_level
from ..config import HeraConfig, Mode
from ..distributed import rank
from ..files import BUILT
from ..heads.families import media_token_ids
from ..heads.targets import AUTO
from ..heads.tokens import IGNORE_INDEX
from ..teachers.encoder import VisionTeacher
from ..teachers.images import ImageLike, chosen_image, image_key

logger = logging.getLogger("llamafactory_hera")

#: A sample for the collator: the lists ``input_ids``, ``attention_mask`` and often ``labels``, and the images.
Features = dict[str, Any]
Collate = Callable[[list[Features]], dict[str, Any]]

STREAM_ROWS = 4  #: Rows to read from a stream for each sample to draw.
_HIGH_CHANCE = 0.2  # above this chance level the scores of heads hardly differ


class Source(Protocol):
    """A dataset whose samples are encoded on demand."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> list[ImageLike]: ...  # not decoded

    def encode(self, row: int) -> Features | None: ...  # None if the row cannot be used


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """A model and its data, as an integration provides them to a selection or a calibration."""

    source: Source
    load_model: Callable[[], nn.Module]  #: Returns the frozen model in evaluation mode, complete on this process.
    collator: Callable[[nn.Module], Collate]  #: Returns the collator for a model; a selection needs ``labels``.
    model_name: str
    dataset_name: str
    autocast: torch.dtype | None = None  #: The compute dtype, if it differs from the weights' dtype.
    num_workers: int = 0  #: The number of processes that decode images.


@dataclass(frozen=True, kw_only=True)
class SelectionInputs(ModelInputs):
    """The model, teacher and data of a selection."""

    load_teacher: Callable[[], VisionTeacher]
    weights: Path | nn.Module  #: The folder of the checkpoint, or the model in memory.
    adapter_folders: list[Path] = field(default_factory=list)
    tokenizer: Any = None  #: Decodes captions for the gallery.


class Sample(NamedTuple):
    """A row of the dataset."""

    row: int
    image: ImageLike  #: The image that the teacher sees, not decoded.
    key: bytes  #: The content digest of that image.
    features: Features


def with_mode(config: HeraConfig, model_configuration: Any, language_model_frozen: bool) -> HeraConfig:
    """Replaces ``hera_select_mode: auto`` with the mode that fits the model and the run, and logs the reason.

    The paper scores the heads of a language model that has not seen an image yet. A model from ``build`` keeps this
    mode after training, so its scores before and after training can be compared.
    """
    if config.select_mode != AUTO:
        return config
    mode: Mode = "llm"
    if not media_token_ids(model_configuration):
        why = "the model reads no images"
    elif language_model_frozen:
        why = "the run trains the projector, and the language model is frozen"
    elif getattr(model_configuration, BUILT, False):
        why = "`llamafactory-hera build` made the model"
    else:
        mode, why = "mllm", "the model is a vision-language model already"
    if rank() == 0:
        logger.info(f"HeRA | hera_select_mode: {mode}, because {why}")
    with warnings.catch_warnings(action="ignore"):  # the settings have been checked before
        return replace(config, select_mode=mode)


def draw(
    source: Source,
    count: int,
    seed: int,
    image_index: int = 0,
    usable: Callable[[Features], bool] = lambda features: True,
) -> tuple[list[Sample], int, int]:
    """Draws up to ``count`` samples, each image once, in an order that depends only on the seed.

    The two returned numbers count the rows without an image and the rows without ``usable`` text.
    """
    order = list(range(len(source)))
    random.Random(seed).shuffle(order)
    drawn: dict[bytes, Sample] = {}
    without_image = without_text = 0
    for row in order:
        if len(drawn) == count:
            break
        images = source.images(row)
        if not images:
            without_image += 1
            continue
        image = images[chosen_image(len(images), image_index)]
        try:
            key = image_key(image)
        except ValueError as error:
            raise ValueError(f"dataset: sample {row} (counted from 0): {error}") from error
        if key in drawn:
            continue
        try:
            features = source.encode(row)
        except Image.DecompressionBombError as error:  # an integration may open images with PIL
            raise ValueError(f"dataset: sample {row} (counted from 0): {error}; shrink this image.") from error
        if features is None or not usable(features):
            without_text += 1
        else:
            drawn[key] = Sample(row, image, key, features)
    return list(drawn.values()), without_image, without_text


def neighbor_count(config: HeraConfig, n: int) -> int:
    """Returns the number of neighbors per sample: ``hera_select_k``, but at most half of the other samples."""
    return min(config.select_k, (n - 1) // 2)


def draw_samples(source: Source, config: HeraConfig, count: int | None = None) -> list[Sample]:
    """Draws up to ``count`` samples, by default ``hera_select_samples``; a smaller count draws the first of these.

    A second sample of the same image is skipped, because the teacher would count the two as neighbors in any case. The
    paper does not describe how it treats such samples.
    """

    def has_tokens(features: Features) -> bool:
        tokens = features["labels" if config.pooling == "answer" else "input_ids"]
        return any(token != IGNORE_INDEX for token in tokens)

    count = config.most_samples if count is None else count
    samples, without_image, without_text = draw(source, count, config.select_seed, config.image_index, has_tokens)
    n, repeated = len(samples), len(source) - len(samples) - without_image - without_text
    skipped = f"{without_image} have no image, {without_text} have no text to average, {repeated} repeat an image"
    if n < 3:
        raise ValueError(
            f"dataset: {n} of its {len(source)} samples can be scored ({skipped}), but a selection "
            "needs 3 or more; use more data, or name the heads in hera_heads."
        )
    if n < count == config.select_samples:
        logger.warning("hera_select_samples: %d were requested, but only %d can be scored (%s).", count, n, skipped)
    if (chance := chance_level(n, k := neighbor_count(config, n))) > _HIGH_CHANCE:
        logger.warning(
            f"hera_select_samples: with {n} samples and {k} neighbors (hera_select_k: {config.select_k}), unrelated "
            f"features reach an MKNN of {chance:.2f}, so the ranking of heads is mostly noise; the paper uses 1,000."
        )
    return samples


def encode_caption(text: str, tokenizer: Any, max_length: int) -> Features | None:
    """Encodes a caption, without an image, as up to ``max_length`` tokens; returns None if the caption is empty.

    Special tokens, and a BOS token that only the chat template writes, get no label, so averages omit them.
    """
    if not text.strip():
        return None
    encoded = tokenizer(text.strip(), truncation=True, max_length=max_length, return_special_tokens_mask=True)
    tokens, special = encoded["input_ids"], encoded["special_tokens_mask"]
    bos = tokenizer.bos_token_id
    if bos is not None and "bos_token" in str(tokenizer.chat_template) and tokens[:1] != [bos]:
        tokens, special = [bos, *tokens][:max_length], [1, *special][:max_length]
    labels = [IGNORE_INDEX if is_special else token for token, is_special in zip(tokens, special, strict=True)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
