"""What all runs share, made from training pictures and text alone: tokenizer, tower, teacher, and a seed's LLaVA."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llamafactory_hera.alignment import nearest_neighbors
from llamafactory_hera.alignment.scoring import score_heads
from llamafactory_hera.config import Mode
from llamafactory_hera.demo import models
from llamafactory_hera.demo.scenes import CELL, GRID, PALETTE, SHAPES, SIZES, Scene, place, render
from llamafactory_hera.heads.pooled import PooledHeads, projection_weights
from llamafactory_hera.selection.forward import Forward
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.fill import encode_images
from settings import Settings
from world import Sample, World

TOKENIZER, TEACHER, CACHE = "parts/tokenizer", "parts/teacher", "parts/teacher_cache"
#: Heads are scored with so many neighbours, as the paper's are.
NEIGHBOURS = 10
GREY = 0.4
#: Of the teacher; the tower has its patches, one for each cell of a scene.
SHAPE = models.Encoder(patch=CELL, layers=3, rate=2e-3)
_VOTERS = 10
_BATCH = 100
_INDEPENDENT = [1] * 800 + [2] * 200 + [3] * 200 + [4] * 200  # objects a scene


def make_tokenizer(root: Path, world: World) -> None:
    """A tokenizer of the training texts."""
    texts = [text for sample in (*world.train, *world.captions) for text in (sample.question, sample.answer)]
    models.train_tokenizer([*texts, "user", "assistant", "\n"]).save_pretrained(root / TOKENIZER)


def make_teacher(root: Path, world: World, settings: Settings) -> dict[str, Any]:
    """The teacher, self-supervised on training pictures; returns what its CLS token tells of others.

    The demo's training, but a view is often grey. Colours and places alone tell almost every picture of these scenes
    from the others, and a teacher that always sees colours learns little about shapes.
    """
    images = [sample.image for sample in world.captions]
    with models.reproducible(0):
        made, processor, losses = models.train_teacher(images, settings.teacher_steps, partly_grey_view, SHAPE)
    for part in (made, processor):
        part.save_pretrained(root / TEACHER)
    features_of(root, [sample.image for sample in (*world.captions, *world.scored)])  # into the cache of all runs
    return {"loss": [losses[0], losses[-1]], "knows": teacher_knowledge(root)}


def partly_grey_view(pixels: torch.Tensor) -> torch.Tensor:
    """A random view of every picture, grey with probability ``GREY``: [B, 3, S, S], the same."""
    view = models.random_view(pixels)
    grey = torch.rand(len(view), 1, 1, 1) < GREY
    return torch.where(grey, view.mean(dim=1, keepdim=True), view)


def features_of(root: Path, images: Sequence[Image.Image]) -> torch.Tensor:
    """The teacher's CLS tokens [N, D], through the cache that runs read."""
    teacher = VisionTeacher.from_pretrained(str(root / TEACHER), "cpu", torch.float32)
    return encode_images(teacher, FeatureCache(root / CACHE, teacher.fingerprint, teacher.dim), images, _BATCH)


def teacher_knowledge(root: Path) -> dict[str, tuple[float, float]]:
    """By factor the share of right votes of the nearest scenes, and the most frequent answer's.

    Scenes are fresh, their factors independent; one half is asked by neighbours in the other. The number of objects is
    asked of scenes of one to four, the rest of scenes with one.
    """
    rng = random.Random("study control")
    scenes = [independent_scene(rng, number) for number in _INDEPENDENT * 2]
    vectors = F.normalize(features_of(root, [render(scene) for scene in scenes]), dim=-1)
    half = len(_INDEPENDENT)
    found = {}
    for factor in ("count", "colour", "shape", "size"):
        counting = factor == "count"
        rows = [row for row in range(half) if counting or len(scenes[row].objects) == 1]
        known, asked = ([scenes[row + shift].objects for row in rows] for shift in (0, half))
        labels, truth = (
            [len(objects) if counting else getattr(objects[0], factor) for objects in of] for of in (known, asked)
        )
        places = torch.tensor(rows)
        nearest = (vectors[places + half] @ vectors[places].T).topk(_VOTERS).indices.tolist()
        votes = [[labels[place] for place in near] for near in nearest]
        right = sum(max(vote, key=vote.count) == answer for vote, answer in zip(votes, truth, strict=True))
        found[factor] = (right / len(truth), max(map(truth.count, set(truth))) / len(truth))
    return found


def independent_scene(rng: random.Random, number: int) -> Scene:
    """A scene of so many objects whose shape, colour, size and cell are drawn evenly and by themselves."""
    cells = sorted(rng.sample(range(GRID**2), number))
    objects = [
        place(rng, rng.choice(SHAPES), rng.choice(tuple(PALETTE)), rng.choice(SIZES), *divmod(cell, GRID))
        for cell in cells
    ]
    return Scene(tuple(objects), background=rng.randint(20, 70))


def seeing_nothing() -> SiglipVisionModel:
    """A vision tower that knows nothing: a token is its patch's pixels and the patch's number."""
    n_pixels, n_patches = 3 * CELL**2, GRID**2
    config = SiglipVisionConfig(
        image_size=GRID * CELL,
        patch_size=CELL,
        hidden_size=n_pixels + n_patches,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    tower = SiglipVisionModel(config)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():  # the layer adds nothing to its input
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if name.endswith("patch_embedding.weight"):
                parameter[:n_pixels] = torch.eye(n_pixels).unflatten(1, parameter.shape[1:])
            if name.endswith("position_embedding.weight"):
                parameter[:, n_pixels:] = 8 * torch.eye(n_patches)
    return tower.eval()


def make_llava(root: Path, world: World, settings: Settings, seed: int) -> None:
    """A seed's LLaVA: its language model, trained on text alone, and a random projector."""
    tokenizer = AutoTokenizer.from_pretrained(root / TOKENIZER)
    with models.reproducible(seed):
        language_model = models.new_language_model(tokenizer, head_dim=12, intermediate_size=160)
        models.train_language_model(language_model, tokenizer, world.texts, settings.language_steps)
        made = models.assemble_llava(language_model, seeing_nothing(), tokenizer)
    for part in made:
        part.save_pretrained(root / llava_of(seed))


def llava_of(seed: int) -> str:
    """The folder of a seed's LLaVA, where all its runs start."""
    return f"seeds/{seed}/llava"


def load_llava(root: Path, seed: int) -> tuple[Any, Any]:
    """A seed's LLaVA and its processor."""
    folder = root / llava_of(seed)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def head_scores(model: Any, batches: Any, features: torch.Tensor, mode: Mode) -> list[list[float]]:
    """MKNN of every head, layers by heads, on samples in order, whose teacher features are [N, D]."""
    forward, pooled, heads = Forward(model.eval(), mode), PooledHeads(model), []
    with pooled, torch.no_grad():
        for batch in batches:
            pooled.pool(forward.tokens("text", batch))
            forward.run(batch)
            heads.append(pooled.take()[0])
    weights = [weight() for weight in projection_weights(model)]
    k = min(NEIGHBOURS, len(features) - 2)
    return score_heads(torch.cat(heads), weights, nearest_neighbors(features, k)).tolist()


def shown(samples: Sequence[Sample]) -> list[Image.Image]:
    """The pictures of samples."""
    return [sample.image for sample in samples]
