"""The collator that adds the teacher's inputs to a batch, in the workers of the data loader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads.tokens import check_image_tokens
from ..teachers.cache import FeatureCache
from ..teachers.encoder import TeacherProcessor
from ..teachers.images import KEY_BYTES, ImageLike, chosen_image, decoded_key, images_by, load_image, sample_images

#: Values of ``hera_source``, the source of the teacher's feature of a sample.
NO_IMAGE, CACHED, PIXELS = 0, 1, 2

#: The prefix of every added tensor; ``Aligner.prepare`` removes these tensors before the model sees the batch.
PREFIX = "hera_"

_TAIL = 16  # final tokens that identify a row, because a collator may change its start


class Piece(NamedTuple):
    """A sample in a packed row."""

    start: int  #: The position of its first token in the row.
    stop: int  #: The position after its last token.
    images: list[int]  #: The indices of its images among the row's images.


#: Maps a packed row to its samples.
PiecesOf = Callable[[Any], list[Piece]]


@dataclass(eq=False)
class HeraCollator:
    """Wraps a collator, and adds these tensors to the batch. B counts samples; a packed row has several.

    - ``hera_source [B]``: ``NO_IMAGE``, ``CACHED`` or ``PIXELS``.
    - ``hera_features [B, D_teacher]``: cached features. They are float16, viewed as int16, because DeepSpeed casts
      every floating-point input to the model's dtype.
    - ``hera_keys [B, 16]``: the images' keys, which identify copies and cached features; 0 without an image.
    - ``hera_rows [P]``: the samples whose source is ``PIXELS``. They are listed because searching the
      device for them would make the CPU wait.
    - ``hera_pixels [B, 3, h, w]``: the images of these samples, processed by the teacher's processor.
    - ``hera_image [B, 2]``: the image's index and the number of images. It replaces ``hera_pixels`` if the teacher
      sees the student's pixels.
    - ``hera_pieces``, shaped like ``input_ids``: for packed rows, the number of each token's sample, counted from 1; 0
      for padding.

    ``Aligner.collator`` creates this collator.
    """

    #: The collator of the training loop, which must keep the order of the samples.
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    #: The teacher's image processor; None if the teacher sees the student's pixels.
    processor: TeacherProcessor | None
    #: The cache of teacher features, if any.
    cache: FeatureCache | None = None
    #: The index of the image to use if a sample has several, clamped to its last image.
    image_index: int = 0
    #: Maps a row of the dataset to its images.
    images_of: Callable[[Any], list[ImageLike]] = sample_images
    #: Columns to remove before ``collate`` is called.
    drop: tuple[str, ...] = ()
    #: Decodes the images that ``teachers.images.undecoded`` left as files in a row.
    decode: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    #: The id of the image placeholder and its count per image; batches with other counts are refused.
    tokens: tuple[int, int] | None = None
    #: Maps a packed row to its samples, which must not attend to each other; None if each row is one sample.
    pieces_of: PiecesOf | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates ``rows`` and adds the teacher's tensors."""
        # Read the images before collating: a host's collator may pop them from the rows, and add a white dummy
        # image to a batch without images.
        pieces = None if self.pieces_of is None else [self.pieces_of(row) for row in rows]
        stored = self._images(rows, pieces)
        chosen = [(chosen_image(len(images), self.image_index), len(images)) for images in stored]
        decoded = stored
        if self.decode is not None:
            rows = [self.decode(row) for row in rows]
            decoded = self._images(rows, pieces)
        pairs = [
            (images[index], files[index]) if count else None
            for images, files, (index, count) in zip(decoded, stored, chosen, strict=True)
        ]
        teacher = self._teacher_inputs(pairs)
        if self.processor is None:
            teacher["hera_image"] = torch.tensor(chosen)
        if self.drop:
            rows = [_without(row, self.drop) for row in rows]
        batch = self.collate(rows)
        if pieces is None:
            _check_order(rows, batch)
        if self.tokens is not None:
            check_image_tokens(batch["input_ids"], batch.get("attention_mask"), teacher["hera_image"], *self.tokens)
        if pieces is not None:
            teacher["hera_pieces"] = numbers = torch.zeros_like(batch["input_ids"])
            placed = [(row, piece) for row, row_pieces in zip(numbers, pieces, strict=True) for piece in row_pieces]
            for number, (row, piece) in enumerate(placed, start=1):
                row[piece.start : piece.stop] = number
        return {**batch, **teacher}

    def _images(self, rows: list[dict[str, Any]], pieces: list[list[Piece]] | None) -> list[list[ImageLike]]:
        """Returns the images of each sample."""
        found = [images_by(self.images_of, row) for row in rows]
        if pieces is None:
            return found
        placed = [(images, piece) for images, row_pieces in zip(found, pieces, strict=True) for piece in row_pieces]
        return [[images[index] for index in piece.images] for images, piece in placed]

    def _teacher_inputs(self, images: list[tuple[ImageLike, ImageLike] | None]) -> dict[str, Tensor]:
        """Creates the tensors from a pair per sample: its image decoded and as stored, or None without an image."""
        source = torch.full((len(images),), NO_IMAGE, dtype=torch.uint8)
        pending = {row: pair for row, pair in enumerate(images) if pair is not None}
        source[list(pending)] = PIXELS
        batch = {"hera_source": source, "hera_keys": torch.zeros(len(images), KEY_BYTES, dtype=torch.uint8)}
        keys: list[bytes] = []
        if self.cache is not None or self.processor is not None:  # objectives on tokens compare no images
            keys = [decoded_key(image, file) for image, file in pending.values()]
            for row, key in zip(pending, keys, strict=True):
                batch["hera_keys"][row] = torch.frombuffer(bytearray(key), dtype=torch.uint8)
        if self.cache is not None and pending:
            known = {row: f for row, f in zip(pending, self.cache.get(keys), strict=True) if f is not None}
            if known:
                batch["hera_features"] = torch.zeros(len(images), self.cache.dim, dtype=torch.int16)
                batch["hera_features"][list(known)] = torch.stack([*known.values()]).view(torch.int16)
                source[list(known)] = CACHED
            pending = {row: image for row, image in pending.items() if row not in known}
        if pending:
            batch["hera_rows"] = torch.tensor(list(pending))
        if pending and self.processor is not None:
            batch["hera_pixels"] = torch.zeros(len(images), 3, *self.processor.pixel_size)
            for row, (image, _) in pending.items():
                batch["hera_pixels"][row] = self.processor(load_image(image))
        return batch


def _without(row: Any, columns: tuple[str, ...]) -> Any:
    """Removes columns from a row; like the Trainer, keeps a row that is not a mapping."""
    return {k: v for k, v in row.items() if k not in columns} if isinstance(row, Mapping) else row


def _check_order(rows: list[dict[str, Any]], batch: dict[str, Any]) -> None:
    """Raises ``ValueError`` if the batch reorders tokenized rows, because they would get the wrong images."""
    ids, tails = batch["input_ids"], [row.get("input_ids") if isinstance(row, Mapping) else None for row in rows]
    if any(tail is None for tail in tails) or len(ids) != len(tails):
        return
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    tails = [torch.as_tensor(row)[-_TAIL:].tolist() for row in tails]
    found = [row[kept][-_TAIL:].tolist() for row, kept in zip(ids, mask, strict=True)]
    for number, (tail, own) in enumerate(zip(tails, found, strict=True)):
        if tail != own and tail in found:
            raise ValueError(
                f"data_collator: it moves sample {number} of a batch to position {found.index(tail)}; keep the order "
                "of the samples, because HeRA adds the teacher's features in that order."
            )
