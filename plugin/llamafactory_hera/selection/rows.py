"""Selects heads or layers on the rows of a training loop, encoded by a collator."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..config import HeraConfig
from ..distributed import on_first, rank
from ..heads.families import media_token_ids, model_config, text_decoder
from ..heads.targets import Targets, file_name
from ..heads.tokens import IGNORE_INDEX, check_row_count, token_mask
from ..teachers.encoder import VisionTeacher
from ..teachers.images import ImageLike, image_key, images_by, load_image, sample_images
from .report import show
from .resolve import untouched_random_state
from .samples import Collate, Features, SelectionInputs, encode_caption, with_mode
from .select import select_targets

#: The number of rows to search for an image first. If none has an image, all rows of a sized dataset are searched.
N_SEARCHED = 1024
_N_DIGESTED = 8  # rows in the digest of a dataset

ImagesOf = Callable[[Any], list[ImageLike]]


def select_heads(
    model: nn.Module,
    rows: Sequence[Any],
    processor: Any,
    hera: HeraConfig,
    *,
    collate: Collate | None = None,
    folder: str | Path | None = None,
    images_of: ImagesOf = sample_images,
) -> Targets:
    """Selects the heads or layers of a model for a training loop of your own; all processes call it together.

        aligner = Aligner(model, hera, targets=select_heads(model, rows, processor, hera))

    Args:
        model: A transformers model, complete on this process.
        rows: The training data.
        processor: The model's processor, or the tokenizer of a language model. It may be None if ``collate`` is given.
        hera: The ``hera_*`` keys.
        collate: Turns rows into a batch with ``labels``. The default reads the chat messages of a row: ``messages``,
            or ``prompt`` and ``completion``. The last message is the answer.
        folder: A folder for ``heads.json`` and its pictures; by default nothing is kept.
        images_of: Maps a row to its images.

    Raises:
        ValueError: The rows, the model or a key is unsuitable.
    """
    device = next(model.parameters()).device
    config = with_mode(hera, model_config(model), is_frozen(model))
    encoded = CollatedRows(model, rows, collate or chat_collator(processor, images_of), images_of, config, processor)
    place = Path(folder or on_first(tempfile.mkdtemp))
    path = place / file_name(config.granularity)
    try:
        with untouched_random_state(), evaluating(model, device):
            chosen = select_targets(encoded.inputs(model, model, device, torch.float32), config, path)
            if folder and rank() == 0:
                show(path)
            return chosen
    finally:
        if not folder:
            on_first(lambda: shutil.rmtree(place))


def chat_collator(processor: Any, images_of: ImagesOf) -> Collate:
    """Returns a collator of chat messages that labels the last message of each row."""

    def collate(rows: list[Any]) -> dict[str, Any]:
        chats = [row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]] for row in rows]
        texts = [processor.apply_chat_template(chat, tokenize=False) for chat in chats]
        prompts = [processor.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True) for c in chats]
        images = [[load_image(image) for image in images_of(row)] for row in rows]
        bos = getattr(processor, "tokenizer", processor).bos_token  # the tokenizer must not add a second BOS token
        added = not (bos and texts[0].startswith(bos))
        options = {"padding": True, "padding_side": "right", "return_tensors": "pt", "add_special_tokens": added}
        if any(images):
            options["images"] = images
        batch = processor(text=texts, **options)
        n_prompt = processor(text=prompts, **options)["attention_mask"].sum(dim=1, keepdim=True)
        answered = (torch.arange(batch["input_ids"].shape[1]) >= n_prompt) & batch["attention_mask"].bool()
        return {**batch, "labels": torch.where(answered, batch["input_ids"], IGNORE_INDEX)}

    return collate


def is_frozen(model: nn.Module) -> bool:
    """Returns True if no parameter of the text decoder is trained."""
    return not any(parameter.requires_grad for parameter in text_decoder(model).parameters())


class CollatedRows:
    """A Source of samples: rows that a collator encodes. The caller must preserve the random state."""

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Any],
        collate: Collate,
        images_of: ImagesOf,
        config: HeraConfig,
        processor: Any = None,
        name: str = "dataset",
    ) -> None:
        self._rows, self._collate, self._images_of, self._name = rows, collate, images_of, name
        self._config, configuration = config, model_config(model)
        self._media = media_token_ids(configuration)
        self.model_name: str = getattr(configuration, "_name_or_path", "") or type(model).__name__
        tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer = tokenizer if hasattr(tokenizer, "batch_decode") else None

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, row: int) -> list[ImageLike]:
        """Returns the images of a row, not yet decoded if the dataset allows it."""
        return images_by(self._images_of, self._rows[row])

    def encode(self, row: int) -> Features | None:
        """Encodes a row with the collator; in mode ``llm``, returns its labeled tokens as a caption."""
        batch = self._collate_rows([{"row": row}])
        ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        token_mask(self._config.pooling, ids, mask, labels)  # raises if labels are missing
        attended = token_mask("mean", ids, mask)[0]
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels
        tokens, labels = ids[0][attended].tolist(), labels[0][attended].tolist()
        if self._config.select_mode == "llm":
            return self._caption(tokens, labels)
        return {"input_ids": tokens, "labels": labels, "row": row}

    def _caption(self, tokens: list[int], labels: list[int]) -> Features | None:
        pairs = [(t, label != IGNORE_INDEX) for t, label in zip(tokens, labels, strict=True) if t not in self._media]
        answers = [[token for token, _ in run] for labeled, run in groupby(pairs, lambda pair: pair[1]) if labeled]
        if self.tokenizer is None:
            ids = [token for answer in answers for token in answer]
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} if ids else None
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return encode_caption("\n".join(text.strip() for text in texts), self.tokenizer, len(tokens))

    def collator(self, model: nn.Module) -> Collate:
        """Returns the collator of the encoded rows."""
        return _pad_captions if self._config.select_mode == "llm" else self._collate_rows

    def _collate_rows(self, features: list[Features]) -> dict[str, Any]:
        """Collates rows, given by their numbers."""
        batch = self._collate([self._rows[feature["row"]] for feature in features])
        check_row_count(batch, len(features))
        return batch

    def inputs(
        self, model: nn.Module, weights: Path | nn.Module, device: torch.device, dtype: torch.dtype, **others: Any
    ) -> SelectionInputs:
        """Returns the inputs of a selection on these rows, with a teacher on ``device`` that computes in ``dtype``."""
        return SelectionInputs(
            source=self,
            load_model=lambda: model,
            collator=self.collator,
            load_teacher=partial(VisionTeacher.from_pretrained, self._config.teacher, device, dtype),
            model_name=self.model_name,
            weights=weights,
            dataset_name=self.name,
            tokenizer=self.tokenizer,
            **others,
        )

    @cached_property
    def name(self) -> str:
        """The name of the dataset, if it has one, its size, and a digest of some rows as the model sees them."""
        digest, places = hashlib.sha256(), islice((row for row in spread(len(self)) if self.images(row)), _N_DIGESTED)
        for row in places:
            digest.update(b"".join(map(image_key, self.images(row))))
            digest.update(json.dumps((self.encode(row) or {}).get("input_ids")).encode())
        return f"{self._name} ({len(self)} rows, {digest.hexdigest()[:8]})"


def spread(count: int) -> Sequence[int]:
    """Lists up to ``N_SEARCHED`` numbers below ``count``, evenly spaced from 0."""
    return range(0, count, max(1, -(-count // N_SEARCHED)))


def _pad_captions(captions: list[Features]) -> dict[str, Any]:
    """Collates captions into a padded batch for the language model, without images."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: pad_sequence([torch.tensor(caption[name]) for caption in captions], True, value)
        for name, value in padding.items()
    }


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to the device of the run and into evaluation mode, and restores both afterward."""
    training = [module for module in model.modules() if module.training]
    before = next(model.parameters()).device
    moved = before != device and not hasattr(model, "hf_device_map")
    model.eval()
    try:
        if moved:
            model.to(device)
        yield
    finally:
        for module in training:
            module.training = True
        if moved:
            model.to(before)
