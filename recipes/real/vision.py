"""The vision tower and the teacher, which are trained here on training images alone, and what they know of others."""

from collections import Counter
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

TOWER = models.Encoder(SIDE, patch=16, width=192, layers=6, rate=1e-3)
TEACHER = models.Encoder(SIDE, patch=8, width=128, layers=4, rate=1e-3)
STEPS = {"tower": 1200, "teacher": 600}
_GREY = 0.3
_LEAST = 8  # emoji whose names end alike


def train_tower(data: Path, folder: Path) -> None:
    """A masked autoencoder, which is the second teacher, too."""
    _save(folder, models.train_vision_tower(_training_images(data), STEPS["tower"], TOWER))


def train_teacher(data: Path, folder: Path) -> None:
    """DINOv2's architecture, trained by contrast."""
    _save(folder, models.train_teacher(_training_images(data), STEPS["teacher"], view, TEACHER))


def _save(folder: Path, trained: tuple[Any, Any, list[float]]) -> None:
    model, processor, losses = trained
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"{folder.name}: {len(losses)} steps, loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}")


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


def write_knowledge(data: Path, folders: list[Path], target: Path) -> None:
    """Accuracy of a vote of the ten nearest training images on held-out ones, beside the most frequent answer's.

    Asked for are the colour and the shape of easy-VQA's images, and the last word of an emoji's name where enough
    names end so (face, symbol, heart, …).
    """
    found: dict[str, Any] = {}
    for folder in folders:
        encoder = VisionTeacher.from_pretrained(str(folder), "cpu", torch.float32)
        for asked, kind in (("shapes", KINDS[0]), ("shapes", KINDS[1]), ("emoji", "last word")):
            known, new = (_labelled(read_json(data / f"{asked}{split}.json"), kind) for split in ("", "_heldout"))
            often = {word for word, n in Counter(label for _, label in known).items() if n >= _LEAST}
            new = [(file, label) for file, label in new if label in often]
            vectors = [
                encoder.encode(encoder.processor.batch([Image.open(data / file) for file, _ in rows]))
                for rows in (known, new)
            ]
            voted = nearest_vote(vectors[0], [label for _, label in known], vectors[1])
            truth = [label for _, label in new]
            found.setdefault(folder.name, {})[kind] = {
                "accuracy": sum(map(str.__eq__, voted, truth)) / len(truth),
                "majority": Counter(truth).most_common(1)[0][1] / len(truth),
                "images": len(truth),
            }
    write_json(target, found)


def _labelled(rows: list[dict[str, Any]], kind: str) -> list[tuple[str, str]]:
    answers = [(row["images"][0], row["messages"][1]["content"]) for row in rows]
    if kind in KINDS:
        return [(file, answer) for file, answer in answers if kind_of(answer) == kind]
    return [(file, answer.split()[-1]) for file, answer in answers]
