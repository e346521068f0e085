"""Draws the images that a head considers most similar, next to the teacher's, before and after training.

A selection stores the neighbors of a few samples for every head, so the pictures need no model.
"""

import json
import os
import textwrap
from base64 import b64encode
from collections.abc import Sequence
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

from ..files import PICTURE, check_replaceable, reading, write_safetensors
from ..heads.targets import Target, Targets
from ..heads.tokens import IGNORE_INDEX
from ..plots import GRAY, GREEN, new_figure, save_figure
from ..teachers.images import load_image
from .samples import Sample
from .scores import Paths, ScoreFile, load_files

_SUFFIX = ".neighbors.safetensors"  # replaces the suffix of a ``heads.json`` or ``scores.json``
_QUERIES, _COLUMNS = 12, 4  # the stored samples, and the neighbors of each in a picture
_PIXELS = 128  # the longer side of an image
# In inches: the side of an image, the distances between images, rows and groups, and the top margin.
_SIDE, _STEP, _ROW, _GROUP, _TOP = 0.84, 0.9, 1.2, 0.5, 0.95


def write_neighbors(
    scores: Path, samples: Sequence[Sample], teacher: Tensor, heads: Tensor, tokenizer: Any = None
) -> None:
    """Writes the neighbors of up to twelve of the N samples, evenly spaced, next to a file of scores.

    ``teacher`` contains the teacher's neighbors ``[N, k]``, and ``heads`` those of every head ``[L, H, N, k]``. The
    tokenizer decodes the captions; without a tokenizer, captions are empty.
    """
    queries = torch.linspace(0, len(samples) - 1, min(_QUERIES, len(samples))).round().long()
    tensors = {"queries": queries, "teacher": teacher[queries], "heads": heads[:, :, queries]}
    tensors = {name: tensor.int() for name, tensor in tensors.items()}
    used = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    stored = {row: _image_and_caption(samples[row], tokenizer) for row in used[used >= 0].tolist()}
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
    last = text.strip().rpartition("\n")[2]  # in mode llm, a caption contains all answers, one per line
    return os.fspath(image), " ".join(last.split())[:160]


class Neighbors(NamedTuple):
    """The content of a file that ``write_neighbors`` wrote: sample numbers, nearest first, -1 for none."""

    queries: Tensor  #: ``[Q]``
    teacher: Tensor  #: ``[Q, k]``
    heads: Tensor  #: ``[L, H, Q, k]``
    samples: dict[str, tuple[str, str]]  #: The image, as a path or data URI, and the caption of each number.

    @classmethod
    def load(cls, scores: Path) -> "Neighbors":
        """Reads the neighbors next to a file of scores; raises ``ValueError`` if this fails."""
        path = scores.with_suffix(_SUFFIX)
        with reading(path, "a file of neighbors that a selection wrote"), safe_open(path, "pt") as file:
            held = cls(**{name: file.get_tensor(name).long() for name in cls._fields[:-1]}, samples={})
            held.samples.update({i: (str(x), str(y)) for i, (x, y) in json.loads(file.metadata()["samples"]).items()})
            numbers = {str(i) for tensor in held[:-1] for i in tensor.unique().tolist()}
            if held.heads.shape[2:] != held.teacher.shape or not numbers <= {*held.samples, "-1"}:
                raise ValueError("its tensors do not match")
            return held

    def shares(self, head: Target, n: int | None = None) -> Tensor:
        """Returns, for each query, the share of a head's ``n`` nearest samples that are neighbors for the teacher."""
        if head.head is None:
            raise ValueError(f"the neighbors of {head} are unknown, because a selection stores those of heads only")
        found, expected = self.heads[head][:, :n, None], self.teacher[:, None]
        return ((found == expected) & (found >= 0)).any(-1).double().mean(-1)


def write_gallery(
    paths: Paths,
    output: str | os.PathLike = "hera_gallery",
    names: Sequence[str] = (),
    heads: str | None = None,
    small: bool = False,
) -> list[Path]:
    """Draws ``OUTPUT_L3H4.png`` for each head, or one ``small`` picture of the first head, and returns the paths.

    ``heads`` are names or the path of a file; the default is the least aligned, the median and the most aligned head
    of the first file. Raises ``ValueError`` if the neighbors of a file are missing.
    """
    files, names = load_files(paths, names, "gallery")
    if files[0].chosen.granularity == "layer" and not heads:
        raise ValueError(f"gallery: {files[0].path} lists layers, but has the neighbors of heads only; add --heads.")
    known = list(files[0].ranked("head"))
    chosen = Targets.parse(heads, key="--heads").items if heads else (known[0], known[len(known) // 2], known[-1])
    if unknown := [str(head) for head in chosen if head not in known]:
        raise ValueError(f"gallery: {', '.join(unknown)} has no score in {files[0].path}; choose other heads.")
    pictures = [Path(f"{output}.png")] if small else [Path(f"{output}_{head}.png") for head in chosen]
    check_replaceable(dict.fromkeys(pictures, PICTURE))
    for head, picture in zip(chosen, pictures, strict=False):
        save_figure(draw_gallery(files, names, head, small), picture)
    return pictures


def draw_gallery(files: Sequence[ScoreFile], names: Sequence[str], head: Target, small: bool = False) -> Figure:
    """Draws a row for each query: its nearest images for the teacher and, in each file, for the head.

    A frame marks images that are also among the teacher's ``k`` nearest. A ``small`` picture shows only the first file
    and the last two, and the two queries whose frames change most like the average from the first file to the last.
    """
    if small:
        files, names = ([each[0], *each[1:][-2:]] for each in (files, names))
    held = [Neighbors.load(file.path) for file in files]
    samples = {index: sample for neighbors in held for index, sample in neighbors.samples.items()}  # of all files
    teacher, shares = held[0].teacher, [neighbors.shares(head, _COLUMNS if small else None) for neighbors in held]
    change, k, n = shares[-1] - shares[0], teacher.shape[1], 2 if small else len(teacher)
    shown = (change - change.mean()).abs().argsort(stable=True)[:n].sort().values if small else torch.arange(n)
    columns, group, top, size = min(_COLUMNS, k), *((0.24, 0.36, 13) if small else (_GROUP, _TOP, 10))
    across = 2 if small else columns  # images in a line
    row_height = 2 * _STEP + 0.24 if small else _ROW
    figure = new_figure(0, 0)
    figure.set_layout_engine("none")
    figure.patch.set_alpha(0 if small else 1)  # suits light and dark pages
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    def draw(title: str, rows: Tensor, left: float, side: float = _SIDE, of_rows: Tensor | None = None) -> float:
        """Draws a group of images, optionally with shares of the teacher's, and returns the next group's left edge."""
        right = left + (side - _SIDE) + min(across, rows.shape[1]) * _STEP
        axes.text(left, top - 0.12, title, fontsize=size, va="bottom", color=GRAY if small else "black")
        for row, query in enumerate(shown.tolist()):
            y = top + row * row_height
            for place, index in enumerate(rows[query, :columns].tolist()):
                if index >= 0:
                    path, caption = samples[str(index)]
                    framed = of_rows is not None and index in teacher[query]
                    corner = left + place % across * _STEP, y + place // across * _STEP
                    _draw_image(axes, path, "" if small else caption, corner, side, framed)
            if of_rows is not None and not small:
                share = of_rows[query].item()
                color = GREEN if share else GRAY
                axes.text(right, y + _SIDE / 2, f"{share:.2f}", fontsize=11, va="center", color=color)
        return right + group

    if not small:
        title = f"{head}: nearest images; frames mark the teacher's {k} nearest, numbers give their share"
        axes.text(0.1, 0.12, title, fontsize=13, va="top")
    left = draw("query", held[0].queries[:, None], 0.1, _STEP + _SIDE if small else _SIDE)
    left = draw("teacher" if small else f"teacher: {files[0].provenance['teacher']}", teacher, left)
    for name, file, neighbors, of_rows in zip(names, files, held, shares, strict=True):
        title = name if small else f"{name}: MKNN {file.scores[head]:.3f} (chance {file.chance:.3f})"
        left = draw(title, neighbors.heads[head], left, of_rows=of_rows)
    width, height = left - group + (0.1 if small else 0.5), top + n * row_height - (0.18 if small else 0)
    figure.set_size_inches(width, height)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def _draw_image(axes: Axes, path: str, caption: str, corner: tuple[float, float], side: float, framed: bool) -> None:
    image, (left, top) = load_image(path), corner
    image.thumbnail((_PIXELS, _PIXELS))
    axes.imshow(image, extent=(left, left + side, top + side, top))
    lines = textwrap.wrap(textwrap.shorten(caption, 34, placeholder="…"), 17)[:2]
    axes.text(left, top + side + 0.03, "\n".join(lines), fontsize=5, va="top")
    if framed:
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=GREEN, linewidth=3))
