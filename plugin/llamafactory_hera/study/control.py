"""Is the teacher worth asking: does its CLS token tell number, colour and shape in scenes new to it?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel

from .files import read_json, replace_json
from .parts import pixels_of

NEIGHBOURS = 10


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
    """kNN accuracy on the validation images, by neighbours among the training images, beside the majority's share.

    The number of objects is asked of all scenes, colour and shape of scenes with one object.
    """
    factors = read_json(data / "factors.json")
    model = AutoModel.from_pretrained(teacher).eval()
    processor = AutoImageProcessor.from_pretrained(teacher)
    vectors, scenes = {}, {}
    for split in ("train", "validation"):
        names = sorted(name for name, entry in factors.items() if entry["split"] == split)
        scenes[split] = [factors[name]["scene"]["objects"] for name in names]
        vectors[split] = _cls(model, pixels_of([data / name for name in names], processor))
    found: dict[str, Any] = {}
    for factor in ("count", "colour", "shape"):
        rows, labels = {}, {}
        for split, listed in scenes.items():
            rows[split] = [i for i, objects in enumerate(listed) if factor == "count" or len(objects) == 1]
            told = [str(len(listed[i])) if factor == "count" else listed[i][0][factor] for i in rows[split]]
            labels[split] = told
        told = nearest_vote(
            vectors["train"][rows["train"]], labels["train"], vectors["validation"][rows["validation"]]
        )
        truth = labels["validation"]
        found[factor] = {
            "accuracy": sum(a == b for a, b in zip(told, truth, strict=True)) / len(truth),
            "majority": max(truth.count(label) for label in set(truth)) / len(truth),
            "images": len(truth),
        }
    replace_json(target, {"k": NEIGHBOURS, "factors": found})


@torch.inference_mode()
def _cls(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).last_hidden_state[:, 0] for part in pixels.split(256)])
