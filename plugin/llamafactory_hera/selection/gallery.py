"""Pictures of the images that a head considers most similar, next to those of the teacher, before and after training.

A selection stores the neighbors of a few samples for every head, so the pictures need no model.
"""

import json
import os
import textwrap
from base64 import b64encode
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import safe_open
from torch import Tensor

from ..alignment.scoring import nearest_samples
from ..files import write_safetensors
from ..heads.targets import Target, Targets
from ..heads.tokens import IGNORE_INDEX
from ..plots import GRAY, GREEN, new_figure, save_figure
from ..teachers.images import load_image
from .samples import Sample
from .scores import Paths, ScoreFile, load_files

_SUFFIX = ".neighbors.safetensors"  # replaces the suffix of a ``heads.json`` or ``scores.json``
_QUERIES, _COLUMNS = 12, 4  # the samples, and the neighbors of each that the picture shows
_PIXELS = 128  # of the longer side of an image
# In inches: the side of an image, the distances between images, rows and groups, and the top margin.
_SIDE, _STEP, _ROW, _GROUP, _TOP = 0.84, 0.9, 1.2, 0.5, 0.95


def write_neighbors(
    scores: Path,
    samples: Sequence[Sample],
    teacher: Tensor,
    outputs: Iterable[tuple[Tensor, Tensor]],
    normalize: bool,
    tokenizer: Any,
) -> None:
    """Writes, next to a file of scores, the neighbors of up to twelve of the N samples, which are equally spaced.

    ``teacher`` contains the teacher's neighbors ``[N, k]``. ``outputs`` yields the head outputs ``[N, H, d]`` and the
    ``o_proj.weight`` of each layer. The tokenizer decodes the captions; without one (None) they are empty.
    """
    n, k = teacher.shape
    queries = torch.linspace(0, n - 1, min(_QUERIES, n)).round().long()
    heads = []
    for of_heads, weight in outputs:
        pairs = zip(of_heads.unbind(1), weight.split(of_heads.shape[-1], dim=1), strict=True)
        heads.append(torch.stack([nearest_samples(*pair, queries, k, normalize) for pair in pairs]).cpu())
    tensors = {"queries": queries, "teacher": teacher.cpu()[queries], "heads": torch.stack(heads)}
    used = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    stored = {row: _image_and_caption(samples[row], tokenizer) for row in used[used >= 0].tolist()}
    tensors = {name: tensor.int() for name, tensor in tensors.items()}
    write_safetensors(scores.with_suffix(_SUFFIX), tensors, {"samples": json.dumps(stored)})


def _image_and_caption(sample: Sample, tokenizer: Any) -> tuple[str, str]:
    """Returns the path of the image, or a small copy as a data URI if it has no file, and the last answer."""
    image = sample.image
    if not isinstance(image, str | os.PathLike):
        buffer, small = BytesIO(), load_image(image)
        small.thumbnail((_PIXELS, _PIXELS))
        small.save(buffer, "JPEG")
        image = f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
    runs = groupby(sample.features.get("labels") or [], lambda label: label != IGNORE_INDEX)
    answers = [list(labels) for labeled, labels in runs if labeled]
    text = tokenizer.decode(answers[-1], skip_special_tokens=True) if answers and tokenizer is not None else ""
    return os.fspath(image), " ".join(text.split())[:160]


class Neighbors(NamedTuple):
    """The content of a file that :func:`write_neighbors` wrote: sample numbers, nearest first, -1 for none."""

    queries: Tensor  #: ``[Q]``
    teacher: Tensor  #: ``[Q, k]``
    heads: Tensor  #: ``[L, H, Q, k]``
    samples: dict[str, tuple[str, str]]  #: The image, as a path or data URI, and the caption of each number.

    @classmethod
    def load(cls, scores: Path) -> "Neighbors":
        """Reads the neighbors next to a file of scores; raises ``OSError`` if they are missing."""
        with safe_open(scores.with_suffix(_SUFFIX), "pt") as file:
            tensors = {name: file.get_tensor(name).long() for name in cls._fields[:-1]}
            return cls(**tensors, samples=json.loads(file.metadata()["samples"]))


def default_heads(scored: ScoreFile) -> list[Target]:
    """Returns the least aligned, the median and the most aligned head of a file of scores."""
    ranked = list(scored.ranked("head"))
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def write_gallery(
    paths: Paths, output: str | os.PathLike = "hera_gallery", names: Sequence[str] = (), heads: str | None = None
) -> list[Path]:
    """Draws ``OUTPUT_L3H4.png`` for each head, and returns the paths.

    ``heads`` are names or the path of a file, by default :func:`default_heads` of the first file of scores. Raises
    ``OSError`` if the neighbors of a file are missing.
    """
    files, names = load_files(paths, names, "gallery")
    chosen = Targets.parse(heads).items if heads else default_heads(files[0])
    known = files[0].ranked("head")
    if unknown := [str(head) for head in chosen if head not in known]:
        raise ValueError(f"gallery: {', '.join(unknown)} has no score in {files[0].path}; choose others.")
    pictures = [Path(f"{output}_{head}.png") for head in chosen]
    for head, picture in zip(chosen, pictures, strict=True):
        save_figure(draw_gallery(files, names, head), picture)
    return pictures


def draw_gallery(files: Sequence[ScoreFile], names: Sequence[str], head: Target) -> Figure:
    """Draws a row for each query: its nearest images for the teacher and, in each file, for the head.

    A frame marks images that are also among the teacher's ``k`` nearest.
    """
    held = [Neighbors.load(file.path) for file in files]
    samples = {index: sample for neighbors in held for index, sample in neighbors.samples.items()}  # of all files
    queries, teacher = held[0].queries.tolist(), held[0].teacher.tolist()
    k, columns = len(teacher[0]), min(_COLUMNS, len(teacher[0]))
    width, height = 1.0 + _STEP + (1 + len(files)) * (columns * _STEP + _GROUP), _TOP + len(queries) * _ROW
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    def draw(title: str, rows: Sequence[Sequence[int]], left: float, compared: bool = False) -> float:
        """Draws a group of images, optionally compared with the teacher, and returns the left edge for the next."""
        right = left + min(columns, len(rows[0])) * _STEP
        axes.text(left, _TOP - 0.12, title, fontsize=10, va="bottom")
        for row, (found, expected) in enumerate(zip(rows, teacher, strict=True)):
            top = _TOP + row * _ROW
            for column, index in enumerate(found[:columns]):
                if index >= 0:
                    framed = compared and index in expected
                    _draw_image(axes, *samples[str(index)], left + column * _STEP, top, framed)
            if compared:
                share = len(set(found) & set(expected)) / k
                color = GREEN if share else GRAY
                axes.text(right, top + _SIDE / 2, f"{share:.2f}", fontsize=11, va="center", color=color)
        return right + _GROUP

    title = f"{head}: nearest images; frames mark the teacher's {k}, numbers their share"
    axes.text(0.1, 0.12, title, fontsize=13, va="top")
    left = draw("query", [[query] for query in queries], 0.1)
    left = draw(f"teacher: {files[0].provenance['teacher']}", teacher, left)
    for name, file, neighbors in zip(names, files, held, strict=True):
        title = f"{name}: MKNN {file.scores[head]:.3f} (chance {file.chance:.3f})"
        left = draw(title, neighbors.heads[head].tolist(), left, compared=True)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _draw_image(axes: Axes, path: str, caption: str, left: float, top: float, framed: bool) -> None:
    image = load_image(path)
    image.thumbnail((_PIXELS, _PIXELS))
    axes.imshow(image, extent=(left, left + _SIDE, top + _SIDE, top))
    lines = textwrap.wrap(textwrap.shorten(caption, 44, placeholder="…"), 23)[:2]
    axes.text(left, top + _SIDE + 0.03, "\n".join(lines), fontsize=5, va="top")
    if framed:
        axes.add_patch(Rectangle((left, top), _SIDE, _SIDE, fill=False, edgecolor=GREEN, linewidth=3))
