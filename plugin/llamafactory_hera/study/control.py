"""Is the teacher worth asking: does its CLS token tell number, colour and shape in scenes new to it?"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from ..demo.scenes import PALETTE, SHAPES, SIZES, Scene, render
from ..files import read_json, write_json
from .world import StudyWorld

NEIGHBOURS = 10
_INDEPENDENT = [1] * 800 + [2] * 200 + [3] * 200 + [4] * 200  # objects a scene


def nearest_vote(train: torch.Tensor, labels: Sequence[str], queries: torch.Tensor, k: int = NEIGHBOURS) -> list[str]:
    """The most frequent label among the k nearest training vectors by cosine; the nearest one's breaks a tie.

    Args:
        train: [N, D].
        labels: N labels.
        queries: [M, D].
        k: Neighbours.

    Returns:
        M labels.
    """
    nearest = (F.normalize(queries, dim=-1) @ F.normalize(train, dim=-1).T).topk(min(k, len(labels))).indices.tolist()
    votes = [[labels[i] for i in row] for row in nearest]
    return [max(vote, key=vote.count) for vote in votes]


def write_control(data: Path, teacher: Path, target: Path) -> None:
    """kNN accuracy beside the share of the most frequent answer, on two kinds of scenes.

    - ``validation``: the validation images, by neighbours among the training images. Colour and shape go together in
      training and differently in validation, so that neighbours of one colour vote for the wrong shape.
    - ``independent``: fresh scenes in which all factors are independent, one half by neighbours in the other. It tells
      what the token holds at all.

    The number of objects is asked of scenes of one to four objects, the other factors of scenes with one.
    """
    model, processor = AutoModel.from_pretrained(teacher).eval(), AutoImageProcessor.from_pretrained(teacher)

    def scenes_of(split: str) -> Drawn:
        entries = {name: e for name, e in read_json(data / "factors.json").items() if e["split"] == split}
        images = [Image.open(data / name).convert("RGB") for name in entries]
        return Drawn([entry["scene"]["objects"] for entry in entries.values()], _cls(model, processor, images))

    rng = random.Random("study control")
    drawn = []
    for _ in range(2):
        scenes = [independent_scene(rng, number) for number in _INDEPENDENT]
        images = [render(StudyWorld(), scene) for scene in scenes]
        drawn.append(
            Drawn([[asdict(item) for item in scene.objects] for scene in scenes], _cls(model, processor, images))
        )
    found = {
        "validation": _accuracies(scenes_of("train"), scenes_of("validation")),
        "independent": _accuracies(*drawn),
    }
    write_json(target, {"k": NEIGHBOURS, "scenes": found})


@dataclass(frozen=True)
class Drawn:
    """Scenes with the teacher's view of them: the factors of each one's objects, and vectors [N, D]."""

    objects: list[list[dict[str, Any]]]
    vectors: torch.Tensor


def independent_scene(rng: random.Random, number: int) -> Scene:
    """A scene of so many objects whose shape, colour, size and cell are drawn evenly and by themselves."""
    world = StudyWorld()
    rows, columns = world.grid
    cells = sorted(rng.sample(range(rows * columns), number))
    objects = [
        world.place(rng, rng.choice(SHAPES), rng.choice(tuple(PALETTE)), rng.choice(SIZES), *divmod(cell, columns))
        for cell in cells
    ]
    return Scene(tuple(objects), background=rng.randint(20, 70))


def _accuracies(known: Drawn, asked: Drawn) -> dict[str, dict[str, float]]:
    found = {}
    for factor in ("count", "colour", "shape", "size"):
        rows = [
            [i for i, objects in enumerate(drawn.objects) if factor == "count" or len(objects) == 1]
            for drawn in (known, asked)
        ]
        labels, truth = (
            [str(len(drawn.objects[i])) if factor == "count" else drawn.objects[i][0][factor] for i in part]
            for drawn, part in zip((known, asked), rows, strict=True)
        )
        told = nearest_vote(known.vectors[rows[0]], labels, asked.vectors[rows[1]])
        found[factor] = {
            "accuracy": sum(a == b for a, b in zip(told, truth, strict=True)) / len(truth),
            "majority": max(truth.count(label) for label in set(truth)) / len(truth),
            "images": len(truth),
        }
    return found


@torch.inference_mode()
def _cls(model: torch.nn.Module, processor: Any, images: list[Image.Image]) -> torch.Tensor:
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return torch.cat([model(part).last_hidden_state[:, 0] for part in pixels.split(256)])
