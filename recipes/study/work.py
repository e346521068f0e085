"""What runs in processes of its own: ``python work.py WORK …`` in the study's folder.

Here are made the pieces that all runs share, from training images and text alone: data, tokenizer, tower, teacher and
models. Beside the teacher lies what its CLS token tells of scenes that it has not seen.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Qwen3ForCausalLM, SiglipVisionModel

from llamafactory_hera.cli import main
from llamafactory_hera.demo import models
from llamafactory_hera.demo.scenes import GRID, PALETTE, SHAPES, SIZES, Scene, place, render
from llamafactory_hera.files import read_json, write_json
from settings import CONTROL, DATA, STUDY, TEACHER, TOKENIZER, TOWER, Seed, Settings
from world import CAPTIONS, TRAIN, write_study_data

GREY = 0.4
NEIGHBOURS = 10
_INDEPENDENT = [1] * 800 + [2] * 200 + [3] * 200 + [4] * 200  # objects a scene


def parts() -> None:
    """Scenes and what is said of them, tokenizer, and each seed's language model before training."""
    settings = _settings()
    write_study_data(Path(DATA), settings)
    texts: list[str] = []
    for row in read_json(f"{DATA}/{CAPTIONS}.json"):
        texts += [message["content"] for message in row["messages"]]
    for row in read_json(f"{DATA}/{TRAIN}.json"):
        for message in row["messages"]:
            texts += [message["role"], "\n" + message["content"].removeprefix("<image>\n")]
    tokenizer = models.train_tokenizer([text for text in texts if text != "<image>"])
    tokenizer.save_pretrained(TOKENIZER)
    words = AutoTokenizer.from_pretrained(TOKENIZER)
    for number in settings.all_seeds:
        with models.reproducible(number):
            model = models.new_language_model(words, head_dim=12, intermediate_size=160)
        for part in (model, words):
            part.save_pretrained(Seed(number).untrained)


def tower() -> None:
    """The vision tower: a masked autoencoder of the training images, frozen from then on."""
    with models.reproducible(0):
        made, _, losses = models.train_vision_tower(_training_images(), _settings().tower_steps)
    made.save_pretrained(TOWER)
    print(f"vision tower: pixel error {losses[0]:.4f} -> {losses[-1]:.4f}")


def teacher() -> None:
    """The teacher, self-supervised on the training images, and what its CLS token tells of scenes new to it.

    The demo's training, but a view is often grey. Colours and places alone tell almost every image of these scenes
    from the others, and a teacher that always sees colours learns little about shapes.
    """
    with models.reproducible(0):
        made, processor, losses = models.train_teacher(
            _training_images(), _settings().teacher_steps, view=_partly_grey_view
        )
    for part in (made, processor):
        part.save_pretrained(TEACHER)
    print(f"teacher: contrastive loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    write_control(Path(DATA), Path(TEACHER), Path(CONTROL))


def teacher_cache(*recipes: str) -> None:
    """The teacher's features of all images that runs read."""
    for recipe in recipes:
        _hera("select", "--teacher-only", recipe)


def llava(number: str) -> None:
    """A seed's LLaVA before any multimodal training: both models and a random projector."""
    seed = Seed(int(number))
    words = AutoTokenizer.from_pretrained(seed.language_model)
    with models.reproducible(seed.number):
        made = models.assemble_llava(
            Qwen3ForCausalLM.from_pretrained(seed.language_model), SiglipVisionModel.from_pretrained(TOWER), words
        )
    for part in made:
        part.save_pretrained(seed.llava)


def select(recipe: str, *scoring: str) -> None:
    """The scores that heads are taken by, on the language model alone; then those on held-out captions."""
    _hera("select", recipe, "hera_select_mode=llm")
    score(*scoring)


def score(recipe: str, *targets: str) -> None:
    """Scores of all heads, ``MODE=FILE`` each."""
    for target in targets:
        mode, file = target.split("=", 1)
        _hera("score", recipe, f"hera_select_mode={mode}", "--output", file)


def _hera(*arguments: str) -> None:
    """A command of ``llamafactory-hera``, in this process."""
    status = main(arguments)
    if status:
        sys.exit(status)


def _settings() -> Settings:
    return Settings.from_dict(read_json(STUDY)["settings"])


def _training_images() -> list[Image.Image]:
    """In the order of their names."""
    return [Image.open(path).convert("RGB") for path in sorted(Path(DATA, "images").glob("train_*.png"))]


def _partly_grey_view(pixels: torch.Tensor) -> torch.Tensor:
    """A random view of every image, grey with probability ``GREY``: [B, 3, S, S] -> [B, 3, S, S]."""
    view = models.random_view(pixels)
    grey = torch.rand(len(view), 1, 1, 1) < GREY
    return torch.where(grey, view.mean(dim=1, keepdim=True), view)


@dataclass(frozen=True)
class Seen:
    """Scenes with the teacher's view of them: the factors of each one's objects, and vectors [N, D]."""

    objects: list[list[dict[str, Any]]]
    vectors: torch.Tensor


def write_control(data: Path, teacher: Path, target: Path) -> None:
    """kNN accuracy of the teacher's CLS token beside the share of the most frequent answer, on two kinds of scenes.

    - ``validation``: the validation images, by neighbours among the training images. Colour and shape go together in
      training and differently in validation, so that neighbours of one colour vote for the wrong shape.
    - ``independent``: fresh scenes in which all factors are independent, one half by neighbours in the other. It tells
      what the token holds at all.

    The number of objects is asked of scenes of one to four objects, the other factors of scenes with one.
    """
    model, processor = AutoModel.from_pretrained(teacher).eval(), AutoImageProcessor.from_pretrained(teacher)

    def seen(objects: list[list[dict[str, Any]]], images: list[Image.Image]) -> Seen:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            vectors = torch.cat([model(part).last_hidden_state[:, 0] for part in pixels.split(256)])
        return Seen(objects, vectors)

    def of_split(split: str) -> Seen:
        entries = {name: e for name, e in read_json(data / "factors.json").items() if e["split"] == split}
        images = [Image.open(data / name).convert("RGB") for name in entries]
        return seen([entry["scene"]["objects"] for entry in entries.values()], images)

    def independent() -> Seen:
        scenes = [independent_scene(rng, number) for number in _INDEPENDENT]
        return seen([[asdict(item) for item in scene.objects] for scene in scenes], [render(s) for s in scenes])

    rng = random.Random("study control")
    found = {
        "validation": _accuracies(of_split("train"), of_split("validation")),
        "independent": _accuracies(independent(), independent()),
    }
    write_json(target, {"k": NEIGHBOURS, "scenes": found})


def independent_scene(rng: random.Random, number: int) -> Scene:
    """A scene of so many objects whose shape, colour, size and cell are drawn evenly and by themselves."""
    cells = sorted(rng.sample(range(GRID**2), number))
    objects = [
        place(rng, rng.choice(SHAPES), rng.choice(tuple(PALETTE)), rng.choice(SIZES), *divmod(cell, GRID))
        for cell in cells
    ]
    return Scene(tuple(objects), background=rng.randint(20, 70))


def _accuracies(known: Seen, asked: Seen) -> dict[str, dict[str, float]]:
    def labels(scenes: Seen, factor: str) -> tuple[list[str], torch.Tensor]:
        if factor == "count":
            return [str(len(objects)) for objects in scenes.objects], scenes.vectors
        rows = [i for i, objects in enumerate(scenes.objects) if len(objects) == 1]
        return [scenes.objects[i][0][factor] for i in rows], scenes.vectors[rows]

    found = {}
    for factor in ("count", "colour", "shape", "size"):
        names, vectors = labels(known, factor)
        truth, queries = labels(asked, factor)
        voted = nearest_vote(vectors, names, queries)
        found[factor] = {
            "accuracy": sum(a == b for a, b in zip(voted, truth, strict=True)) / len(truth),
            "majority": max(truth.count(label) for label in set(truth)) / len(truth),
            "images": len(truth),
        }
    return found


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


WORKS = {work.__name__: work for work in (parts, tower, teacher, teacher_cache, llava, select, score)}

if __name__ == "__main__":
    name, *given = sys.argv[1:]
    WORKS[name](*given)
