"""Pictures of the images that a head considers most similar, next to those of the teacher, before and after training.

A selection writes the neighbors of a few samples by every head and layer, so that pictures need no model.
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
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..alignment.scoring import nearest_samples
from ..files import write_safetensors
from ..heads.targets import Target, Targets
from ..heads.tokens import IGNORE_INDEX
from ..plots import GRAY, GREEN, new_figure, save_figure
from ..teachers.images import load_image
from .samples import Sample
from .scores import Paths, ScoreFile, load_files

#: Of each layer: head outputs ``[N, H, d]``, layer output ``[N, D]`` and ``o_proj.weight``.
Outputs = Iterable[tuple[Tensor, Tensor, Tensor]]

_QUERIES, _COLUMNS = 12, 4  # samples, and the neighbors of each that are drawn
_PIXELS = 128  # of the longer side of an image
# In inches: an image, its distance to the next one and to the next row, between groups, and the head of the picture.
_SIDE, _STEP, _ROW, _GROUP, _TOP = 0.84, 0.9, 1.2, 0.5, 0.95


def neighbors_file(scores: Path) -> Path:
    """Returns the path of the neighbors that belong to a ``heads.json`` or ``scores.json``."""
    return scores.with_suffix(".neighbors.safetensors")


def write_neighbors(
    path: Path, samples: Sequence[Sample], teacher: Tensor, outputs: Outputs, normalize: bool, tokenizer: Any
) -> None:
    """Writes the neighbors of twelve of N samples, equally spaced in the order of the draw.

    ``teacher`` are the neighbors of the teacher, ``[N, k]``; a tokenizer, if there is one, decodes the captions.
    """
    n, k = teacher.shape
    queries = torch.linspace(0, n - 1, min(_QUERIES, n)).round().long()
    heads, layers = [], []
    for of_heads, of_layer, weight in outputs:
        pairs = zip(of_heads.unbind(1), weight.split(of_heads.shape[-1], dim=1), strict=True)
        heads.append(torch.stack([nearest_samples(*pair, queries, k, normalize) for pair in pairs]).cpu())
        layers.append(nearest_samples(of_layer, None, queries, k, normalize).cpu())
    tensors = {"queries": queries, "teacher": teacher.cpu()[queries]}
    tensors |= {"heads": torch.stack(heads), "layers": torch.stack(layers)}
    used = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    stored = {row: _image_and_caption(samples[row], tokenizer) for row in used[used >= 0].tolist()}
    write_safetensors(path, {name: tensor.int() for name, tensor in tensors.items()}, {"samples": json.dumps(stored)})


def _image_and_caption(sample: Sample, tokenizer: Any) -> tuple[str, str]:
    """The path of the image, or a small copy as a data URI if it is no file; and the last answer."""
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
    """The content of a file that :func:`write_neighbors` wrote: numbers of samples, nearest first, -1 for none."""

    queries: Tensor  #: ``[Q]``
    teacher: Tensor  #: ``[Q, k]``
    heads: Tensor  #: ``[L, H, Q, k]``
    layers: Tensor  #: ``[L, Q, k]``
    samples: dict[str, tuple[str, str]]  #: The image, as a path or data URI, and the caption of each number.

    @classmethod
    def load(cls, scores: Path) -> "Neighbors":
        """Reads the neighbors that belong to a file of scores; ``ValueError`` if they are missing or damaged."""
        path = neighbors_file(scores)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).long() for name in cls._fields[:-1]}
                return cls(**tensors, samples=json.loads(file.metadata()["samples"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            remedy = f"keep it next to {scores.name}, or score again"
            raise ValueError(f"gallery: {path} cannot be read ({error}); {remedy}.") from error

    def of(self, target: Target) -> Tensor:
        """Returns the neighbors ``[Q, k]`` of a head or layer."""
        return self.layers[target.layer] if target.head is None else self.heads[target.layer, target.head]


def default_targets(scored: ScoreFile) -> list[Target]:
    """Returns the worst, the median and the best head or layer of a file."""
    ranked = list(scored.ranked())
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def write_gallery(
    paths: Paths, output: str | os.PathLike = "hera_gallery", names: Sequence[str] = (), targets: str | None = None
) -> list[Path]:
    """Draws ``OUTPUT_L3H4.png`` for each head or layer of ``targets``, and returns the paths.

    These are names or the path of a file; the default is :func:`default_targets` of the first file of scores.

    Raises:
        ValueError: The files cannot be compared, or a head has no score or no images.
    """
    files, names = load_files(paths, names, "gallery")
    chosen = Targets.parse(targets, files[0].chosen.granularity).items if targets else default_targets(files[0])
    known = files[0].ranked()
    if unknown := [str(target) for target in chosen if target not in known]:
        raise ValueError(f"gallery: {', '.join(unknown)} has no score in {files[0].path}; name others.")
    pictures = [Path(f"{output}_{target}.png") for target in chosen]
    for target, picture in zip(chosen, pictures, strict=True):
        save_figure(draw_gallery(files, names, target), picture)
    return pictures


def draw_gallery(files: Sequence[ScoreFile], names: Sequence[str], target: Target) -> Figure:
    """Draws a row for each query: the nearest images of the teacher and, by a head or layer, of each file.

    A frame marks images that are also among the ``k`` nearest of the teacher.
    """
    held = [Neighbors.load(file.path) for file in files]
    samples = {index: sample for neighbors in held for index, sample in neighbors.samples.items()}  # of all files
    groups = [held[0].teacher.tolist(), *(neighbors.of(target).tolist() for neighbors in held)]
    k = len(groups[0][0])
    columns = min(_COLUMNS, k)
    starts = [0.45 + _STEP + group * (columns * _STEP + _GROUP) for group in range(len(groups))]
    width, height = starts[-1] + columns * _STEP + _GROUP, _TOP + len(groups[0]) * _ROW
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    def write(x: float, y: float, text: str, size: float, va: str = "top", **style: Any) -> None:
        axes.text(x, y, text, fontsize=size, va=va, parse_math=False, **style)

    def draw(index: int, x: float, y: float, framed: bool = False) -> None:
        path, caption = samples[str(index)]
        try:
            image = load_image(path)
        except ValueError as error:
            remedy = "A relative path starts in the folder in which the heads were scored; score again"
            raise ValueError(f"gallery: {error} {remedy} if images were moved.") from error
        image.thumbnail((_PIXELS, _PIXELS))
        axes.imshow(image, extent=(x, x + _SIDE, y + _SIDE, y))
        lines = textwrap.wrap(textwrap.shorten(caption, 44, placeholder="…"), 23)[:2]
        write(x, y + _SIDE + 0.03, "\n".join(lines), 5)
        if framed:
            axes.add_patch(Rectangle((x, y), _SIDE, _SIDE, fill=False, edgecolor=GREEN, linewidth=3))

    write(0.1, 0.12, f"{target}: nearest images; frames, and the share on the right, mark the teacher's {k}", 13)
    titles = [f"teacher: {files[0].provenance['teacher']}"]
    for name, file in zip(names, files, strict=True):
        score = file.layer_scores[target.layer] if target.head is None else file.scores[target]
        titles.append(f"{name}: MKNN {score:.3f} (chance {file.chance:.3f})")
    for x, title in zip((0.1, *starts), ("query", *titles), strict=True):
        write(x, _TOP - 0.12, title, 10, "bottom")
    for row, query in enumerate(held[0].queries.tolist()):
        y, right = _TOP + row * _ROW, set(groups[0][row])
        draw(query, 0.1, y)
        for number, (start, rows) in enumerate(zip(starts, groups, strict=True)):
            for place, index in enumerate(rows[row][:columns]):
                if index >= 0:
                    draw(index, start + place * _STEP, y, framed=number > 0 and index in right)
            if number:
                share = len(set(rows[row]) & right) / k
                style = {"color": GREEN if share else GRAY}
                write(start + columns * _STEP, y + _SIDE / 2, f"{share:.2f}", 11, "center", **style)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure
