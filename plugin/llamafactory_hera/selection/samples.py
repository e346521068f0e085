"""What a selection reads: a dataset as plain objects, the samples drawn from it by seed, captions as token ids."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..alignment.neighbors import chance_level
from ..config import HeraConfig
from ..heads.tokens import IGNORE_INDEX
from ..teachers.encoder import VisionTeacher
from ..teachers.images import ImageLike, chosen_image, image_key

logger = logging.getLogger(__name__)

#: What the model sees of one sample: ``input_ids``, ``attention_mask``, mostly ``labels``, as lists, and what its
#: collator makes pixels of.
Features = dict[str, Any]
Collate = Callable[[list[Features]], dict[str, Any]]

STREAM_ROWS = 4  #: Of a stream, read for each sample to draw.
_HIGH_CHANCE = 0.2  # above this MKNN of unrelated features little room is left for heads to differ


class Source(Protocol):
    """A dataset of which single samples are encoded when asked for."""

    def __len__(self) -> int: ...

    def images(self, row: int) -> list[ImageLike]: ...  # not decoded

    def encode(self, row: int) -> Features | None: ...  # None for a sample that cannot be used


@dataclass(frozen=True)
class SelectionInputs:
    """Model, teacher and data of a selection, as a host gives them; names as the recipe has them."""

    source: Source
    #: The model, frozen, whole on this process.
    load_model: Callable[[], nn.Module]
    #: From the model to what makes batches of features, with ``labels``.
    collator: Callable[[nn.Module], Collate]
    load_teacher: Callable[[], VisionTeacher]
    model_name: str
    #: Its weights: a checkpoint's folder, or a model in memory.
    weights: Path | nn.Module
    dataset_name: str
    #: Of the adapters on top of the model.
    adapter_folders: list[Path] = field(default_factory=list)
    #: The type in which the run computes, where it is not the weights' own.
    autocast: torch.dtype | None = None
    #: Processes that decode images.
    num_workers: int = 0
    #: Makes captions of labeled tokens, for people.
    tokenizer: Any = None


class Sample(NamedTuple):
    """A row's images, not decoded, the one that stands for it with its content digest, and its text."""

    row: int
    images: list[ImageLike]
    image: ImageLike
    key: bytes
    features: Features


@contextmanager
def of_sample(row: int) -> Iterator[None]:
    """Adds the sample to what is said of a broken image."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("The image"):
            raise
        raise ValueError(f"dataset: sample {row} (counted from 0): {error}") from error


def draw(
    source: Source,
    count: int,
    seed: int,
    image_index: int = 0,
    usable: Callable[[Features], bool] = lambda features: True,
) -> tuple[list[Sample], int, int]:
    """Up to ``count`` samples, drawn by the seed alone, each image once; how many rows had no image, and no text."""
    order = list(range(len(source)))
    random.Random(seed).shuffle(order)
    drawn: list[Sample] = []
    seen: set[bytes] = set()
    without_image = without_text = 0
    for row in order:
        if len(drawn) == count:
            break
        images = source.images(row)
        if not images:
            without_image += 1
            continue
        image = images[chosen_image(len(images), image_index)]
        with of_sample(row):
            key = image_key(image)
            features = None if key in seen else source.encode(row)
        if key in seen:
            continue
        if features is None or not usable(features):
            without_text += 1
            continue
        seen.add(key)
        drawn.append(Sample(row, list(images), image, key, features))
    return drawn, without_image, without_text


def draw_samples(source: Source, config: HeraConfig) -> list[Sample]:
    """Draws ``hera_select_samples`` samples in an order that depends on the seed alone.

    Two samples of one image would be each other's nearest neighbor for the teacher, whatever the head, so the second
    is passed over. The paper does not say how it treats them.
    """

    def has_tokens(features: Features) -> bool:
        if config.pooling == "answer":
            return any(label != IGNORE_INDEX for label in features["labels"])
        return len(features["input_ids"]) > 0

    asked, k = config.select.samples, config.select.k
    samples, without_image, without_text = draw(source, asked, config.select.seed, config.image_index, has_tokens)
    drawn = len(samples)
    passed_over = f"{without_image} have no image, {without_text} no text that leaves a token; each image counts once"
    if drawn < k + 2:
        raise ValueError(
            f"dataset: {drawn} of its {len(source)} samples can be scored, and hera_select_k: {k} needs {k + 2} or "
            f"more ({passed_over}). Use more data with images and assistant turns, or lower hera_select_k."
        )
    if drawn < asked:
        logger.warning("hera_select_samples: %d are asked for, and %d are there (%s).", asked, drawn, passed_over)
    chance = chance_level(drawn, k)
    if chance > _HIGH_CHANCE:
        logger.warning(
            f"hera_select_samples: on {drawn} samples even unrelated features reach an MKNN of {chance:.2f} with "
            f"hera_select_k: {k}, so that the ranking of heads is mostly noise. Take more; the paper takes 1,000."
        )
    return samples


def samples_digest(samples: Sequence[Sample]) -> str:
    """A digest of the images and their order."""
    return hashlib.sha256(b"".join(sample.key for sample in samples)).hexdigest()


def encode_caption(text: str, tokenizer: Any, max_length: int) -> Features | None:
    """A caption as up to ``max_length`` token ids for the language model alone; None for an empty one.

    Special tokens that the tokenizer puts around it, and the BOS token where a chat template writes it instead, have
    no label: they are not averaged.
    """
    if not text.strip():
        return None
    encoded = tokenizer(text.strip(), truncation=True, max_length=max_length, return_special_tokens_mask=True)
    tokens, special = encoded["input_ids"], encoded["special_tokens_mask"]
    bos = tokenizer.bos_token_id
    if bos is not None and "bos_token" in str(tokenizer.chat_template) and tokens[:1] != [bos]:
        tokens, special = [bos, *tokens][:max_length], [1, *special][:max_length]
    labels = [IGNORE_INDEX if skipped else token for token, skipped in zip(tokens, special, strict=True)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
