"""What a head sees: the images that it takes for neighbors beside the teacher's, before training and after.

A selection writes the neighbors of a few samples by every head and layer while it holds their features; a picture of
any head is then drawn from that file without a model.
"""

import json
import os
import textwrap
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
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
from ..teachers.images import ImageLike, load_image
from .samples import Sample
from .scores import ScoreFile, load_files

_QUERIES = 12
_SHOWN = 4  # of each query's neighbors
_PIXELS = 128  # of an image's longer side
_CAPTION = 160  # characters that are kept
# inches: an image, from one to the next, from one group of images to the next, the head of the picture
_SIDE, _STEP, _ROW, _GROUP, _TOP = 0.84, 0.9, 1.2, 0.5, 0.95


def neighbors_file(scores: Path) -> Path:
    """The file beside ``heads.json`` or ``scores.json`` that holds who is whose neighbor."""
    return scores.with_suffix(".neighbors.safetensors")


def write_neighbors(
    path: Path,
    samples: Sequence[Sample],
    teacher: Tensor,
    features: Iterable[tuple[Tensor, Tensor, Callable[[], Tensor]]],
    normalize: bool,
    tokenizer: Any,
) -> None:
    """Writes the neighbors of a dozen of N samples, equally far apart in the order in which they were drawn.

    Args:
        path: See :func:`neighbors_file`.
        samples: In the order of the features.
        teacher: The teacher's neighbors ``[N, k]``.
        features: Of each layer, its heads' outputs ``[N, H, d]``, its own ``[N, D]``, and its output projection.
        normalize: As in scoring.
        tokenizer: Makes captions of the samples' labeled tokens; None leaves them out.
    """
    n, k = teacher.shape
    queries = torch.linspace(0, n - 1, min(_QUERIES, n)).round().long()
    found = [
        (nearest_samples(heads, weight(), queries, k, normalize), nearest_samples(own, None, queries, k, normalize))
        for heads, own, weight in features
    ]
    heads, layers = (torch.stack(side).cpu() for side in zip(*found, strict=True))
    tensors = {"queries": queries, "teacher": teacher.cpu()[queries], "heads": heads, "layers": layers}
    seen = torch.cat([tensor.flatten() for tensor in tensors.values()]).unique()
    kept = {row: [_kept(samples[row].image), _caption(samples[row], tokenizer)] for row in seen[seen >= 0].tolist()}
    write_safetensors(path, {name: tensor.int() for name, tensor in tensors.items()}, {"samples": json.dumps(kept)})


def _kept(image: ImageLike) -> str:
    """A file by its path; of an image that has none, a small copy as a data URI."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    buffer, small = BytesIO(), load_image(image)
    small.thumbnail((_PIXELS, _PIXELS))
    small.save(buffer, "JPEG")
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def _caption(sample: Sample, tokenizer: Any) -> str:
    told = [label for label in sample.features.get("labels") or [] if label != IGNORE_INDEX]
    text = tokenizer.decode(told, skip_special_tokens=True) if tokenizer is not None else ""
    return " ".join(text.split())[:_CAPTION]


class Neighbors(NamedTuple):
    """The content of a file that :func:`write_neighbors` wrote; indices are those of samples, -1 for none."""

    queries: Tensor  #: ``[Q]``
    teacher: Tensor  #: ``[Q, k]``, nearest first
    heads: Tensor  #: ``[L, H, Q, k]``
    layers: Tensor  #: ``[L, Q, k]``
    samples: dict[str, list[str]]  #: Path or data URI of an image, and caption, by index.

    @classmethod
    def load(cls, scores: Path) -> "Neighbors":
        """Reads the file beside a file of scores; raises ValueError where there is none."""
        path = neighbors_file(scores)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).long() for name in cls._fields[:-1]}
                return cls(**tensors, samples=json.loads(file.metadata()["samples"]))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"gallery: {path} cannot be read ({error}). `select` and `score` write it beside their scores; score "
                "again, or move the two files together."
            ) from error

    def of(self, target: Target) -> Tensor:
        """``[Q, k]`` of a head or layer."""
        return self.layers[target.layer] if target.head is None else self.heads[target.layer, target.head]


def default_targets(scored: ScoreFile) -> list[Target]:
    """The worst, the median and the best head or layer of a file."""
    ranked = list(scored.ranked())
    return [ranked[0], ranked[len(ranked) // 2], ranked[-1]]


def write_gallery(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike = "hera_gallery",
    names: Sequence[str] = (),
    targets: str | None = None,
) -> list[Path]:
    """Draws ``OUTPUT_L3H4.png`` for each of ``targets`` (names, or the path of a file of them), and returns the paths.

    By default these are the worst, the median and the best of the first file; a file or the folder of a ``select`` or
    ``score`` is a path. Bad input is a ValueError that names it and the remedy.
    """
    files, names = load_files(paths, names, "gallery")
    known = files[0].ranked()
    chosen = Targets.parse(targets, files[0].chosen.granularity).items if targets else default_targets(files[0])
    if outside := [str(target) for target in chosen if target not in known]:
        raise ValueError(f"gallery: {', '.join(outside)} has no score in {files[0].path}; name others.")
    pictures = []
    for target in chosen:
        figure = draw_gallery(files, names, target)
        pictures.append(Path(f"{output}_{target}.png"))
        pictures[-1].parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, pictures[-1])
    return pictures


def draw_gallery(files: Sequence[ScoreFile], names: Sequence[str], target: Target) -> Figure:
    """A row for each query, with the nearest images of the teacher and, by a head or layer, of each file.

    An image is framed where it is one of the teacher's ``k``, fewer of which are shown.
    """
    held = [Neighbors.load(file.path) for file in files]
    first, facts = held[0], files[0].provenance
    # each file has the images of its own neighbors
    samples = {index: sample for side in held for index, sample in side.samples.items()}
    n_queries, k = first.teacher.shape
    shown = min(_SHOWN, k)
    starts = [0.1 + _STEP + 0.35 + group * (shown * _STEP + _GROUP) for group in range(1 + len(held))]
    width, height = starts[-1] + shown * _STEP + _GROUP, _TOP + n_queries * _ROW
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")

    def write(x: float, y: float, text: str, size: float, va: str = "top", **style: Any) -> None:
        axes.text(x, y, text, fontsize=size, va=va, parse_math=False, **style)

    def show(index: int, x: float, y: float) -> None:
        path, caption = samples[str(index)]
        try:
            image = load_image(path)
        except ValueError as error:
            remedy = "A relative path starts in the folder in which it was scored; score again if images were moved."
            raise ValueError(f"gallery: {error} {remedy}") from error
        image.thumbnail((_PIXELS, _PIXELS))
        axes.imshow(image, extent=(x, x + _SIDE, y + _SIDE, y))
        lines = textwrap.wrap(textwrap.shorten(caption, 44, placeholder="…"), 23)[:2]
        write(x, y + _SIDE + 0.03, "\n".join(lines), 5)

    what = f"{target}: its {shown} nearest of {facts['samples']} images, framed where among the teacher's {k}"
    write(0.1, 0.12, f"{what}; beside each row the share of the {k} that both name", 13)
    write(0.1, _TOP - 0.12, "query", 10, "bottom")
    write(starts[0], _TOP - 0.12, f"teacher: {facts['teacher']}", 10, "bottom")
    for start, name, file in zip(starts[1:], names, files, strict=True):
        score = file.scores[target] if target.head is not None else file.layer_scores[target.layer]
        text = f"{name}: MKNN {score:.3f} (chance {file.chance:.3f})"
        write(start, _TOP - 0.12, text, 10, "bottom", weight="bold")
    for row, query in enumerate(first.queries.tolist()):
        y, of_teacher = _TOP + row * _ROW, first.teacher[row].tolist()
        show(query, 0.1, y)
        found = [of_teacher, *(side.of(target)[row].tolist() for side in held)]
        for start, nearest in zip(starts, found, strict=True):
            for place, index in enumerate(nearest[:shown]):
                x = start + place * _STEP
                if index >= 0:
                    show(index, x, y)
                if nearest is not of_teacher and index in of_teacher:
                    axes.add_patch(Rectangle((x, y), _SIDE, _SIDE, fill=False, edgecolor=GREEN, linewidth=3))
            if nearest is not of_teacher:
                share = len(set(nearest) & set(of_teacher)) / k
                color = GREEN if share else GRAY
                write(start + shown * _STEP, y + _SIDE / 2, f"{share:.2f}", 11, "center", color=color)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure
