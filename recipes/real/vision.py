"""The vision tower and the teacher, which are trained here on training images alone, and what they know of others."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from llamafactory_hera.demo import models
from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.teachers.encoder import VisionTeacher
from pictures import KINDS, SIDE, kind_of
from work import nearest_vote

_TOWER = models.Encoder(SIDE, patch=16, width=192, layers=6, rate=1e-3)
_TEACHER = models.Encoder(SIDE, patch=8, width=128, layers=4, rate=1e-3)
_TOWER_STEPS, _TEACHER_STEPS = 500, 300
_GREY = 0.3
_LEAST = 8  # emoji whose names end alike


def train_tower(data: Path, folder: Path) -> None:
    """A masked autoencoder, which is the second teacher, too."""
    with models.reproducible(0):
        _save(folder, models.train_vision_tower(_training_images(data), _TOWER_STEPS, _TOWER))


def train_teacher(data: Path, folder: Path) -> None:
    """DINOv2's architecture, trained by contrast."""
    with models.reproducible(0):
        _save(folder, models.train_teacher(_training_images(data), _TEACHER_STEPS, view, _TEACHER))


def _save(folder: Path, trained: tuple[Any, Any, list[float]]) -> None:
    for part in trained[:2]:
        part.save_pretrained(folder)
    print(f"{folder.name}: loss {trained[2][0]:.3f} -> {sum(trained[2][-20:]) / 20:.3f}")


def _training_images(data: Path) -> list[Image.Image]:
    """Every emoji twice, so that there are as many of them as of shapes."""
    rows = read_json(data / "emoji.json") * 2 + read_json(data / "shapes.json")
    return [Image.open(data / row["images"][0]) for row in rows]


def view(pixels: torch.Tensor) -> torch.Tensor:
    """A random part of every image, half of its sides at least, in other colours or none: [B, 3, S, S], the same."""
    affine = torch.zeros(len(pixels), 2, 3)
    scale = torch.empty(len(pixels)).uniform_(0.5, 1.0)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = (1 - scale)[:, None] * torch.empty(len(pixels), 2).uniform_(-1, 1)
    cut = F.grid_sample(pixels, F.affine_grid(affine, list(pixels.shape), align_corners=False), align_corners=False)
    grey = torch.rand(len(pixels), 1, 1, 1) < _GREY
    return models.random_view(torch.where(grey, cut.mean(dim=1, keepdim=True), cut))


def write_knowledge(data: Path, folders: Sequence[Path], target: Path) -> None:
    """Accuracy of the ten nearest training images' vote on held-out ones, the most frequent answer's, and how many.

    Asked for are the colour and the shape of easy-VQA's images, and the last word of an emoji's name where enough
    names end so (face, symbol, heart, …).
    """
    found: dict[str, Any] = {folder.name: {} for folder in folders}
    for kind, dataset in {"colour": "shapes", "shape": "shapes", "last word of the name": "emoji"}.items():
        known, new = (_labelled(read_json(data / f"{dataset}{split}.json"), kind) for split in ("", "_heldout"))
        counts = Counter(label for _, label in known)
        new = [(file, label) for file, label in new if counts[label] >= _LEAST]
        truth = [label for _, label in new]
        for folder in folders:
            encoder = VisionTeacher.from_pretrained(str(folder), "cpu", torch.float32)
            pixels = (encoder.processor.batch([Image.open(data / file) for file, _ in rows]) for rows in (known, new))
            vectors, queries = map(encoder.encode, pixels)
            voted = nearest_vote(vectors, [label for _, label in known], queries)
            right, majority = sum(map(str.__eq__, voted, truth)), Counter(truth).most_common(1)[0][1]
            found[folder.name][kind] = (right / len(truth), majority / len(truth), len(truth))
    write_json(target, found)


def _labelled(rows: list[dict[str, Any]], kind: str) -> list[tuple[str, str]]:
    answers = [(row["images"][0], row["messages"][1]["content"]) for row in rows]
    if kind in KINDS:
        return [(file, answer) for file, answer in answers if kind_of(answer) == kind]
    return [(file, answer.split()[-1]) for file, answer in answers]
