"""The parts that runs share, trained only on training pictures and texts: tokenizer, teacher, a LLaVA per seed."""

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

from llamafactory_hera.selection.passes import fill_cache
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import image_key
from recipes.demo import models
from recipes.demo.scenes import CELL, GRID, PALETTE, SHAPES, SIZES, Scene, place, render

from .settings import Settings
from .world import World

TOKENIZER, TEACHER, CACHE, LLAVA = "parts/tokenizer", "parts/teacher", "parts/teacher_cache", "seeds/{}/llava"
GRAY = 0.4
#: The teacher's shape. Both the teacher and the tower have one patch for each cell of a scene.
SHAPE = models.Encoder(patch=CELL, layers=3, rate=2e-3)
_VOTERS = 10
_BATCH = 100
_INDEPENDENT = [1] * 800 + [2] * 200 + [3] * 200 + [4] * 200  # objects in each scene


def make_parts(root: Path, world: World, settings: Settings) -> dict[str, Any]:
    """Trains the tokenizer on the training texts and the teacher on the training pictures.

    The teacher is trained as in the demo, except that many views are gray. Color and place alone distinguish almost
    all pictures of these scenes, so a teacher that always sees colors learns little about shapes.

    Returns:
        The teacher's first and last loss, and the result of ``teacher_knowledge``.
    """
    texts = [text for sample in (*world.train, *world.captions) for text in (sample.question, sample.answer)]
    models.train_tokenizer([*texts, "user", "assistant", "\n"]).save_pretrained(root / TOKENIZER)
    images = [sample.image for sample in world.captions]
    with models.reproducible(0):
        teacher, processor, losses = models.train_teacher(images, settings.teacher_steps, partly_gray_view, SHAPE)
    for part in (teacher, processor):
        part.save_pretrained(root / TEACHER)
    features_of(root, [*images, *(sample.image for sample in world.scored)])  # fills the cache for all runs
    return {"loss": [losses[0], losses[-1]], "knows": teacher_knowledge(root)}


def partly_gray_view(pixels: torch.Tensor) -> torch.Tensor:
    """Makes a random view of each picture ``[B, 3, S, S]``; a view is gray with probability ``GRAY``."""
    view = models.random_view(pixels)
    gray = torch.rand(len(view), 1, 1, 1) < GRAY
    return torch.where(gray, view.mean(dim=1, keepdim=True), view)


def features_of(root: Path, images: Sequence[Image.Image]) -> torch.Tensor:
    """Returns the teacher's CLS tokens ``[N, D]``, and adds them to the cache that the runs read."""
    teacher = VisionTeacher.from_pretrained(str(root / TEACHER), "cpu", torch.float32)
    cache = FeatureCache(root / CACHE, teacher.fingerprint, teacher.dim)
    keys = [image_key(image) for image in images]
    fill_cache(teacher, cache, dict(zip(keys, images, strict=True)), _BATCH)
    return torch.stack([feature for feature in cache.get(keys) if feature is not None]).float()


def teacher_knowledge(root: Path) -> dict[str, tuple[float, float]]:
    """Measures how well the teacher's nearest neighbors predict the factors of a scene.

    The scenes are new, and their factors are independent. For each scene of one half, the nearest scenes of the other
    half vote. The vote on the number of objects uses scenes with one to four objects. Votes on the other factors use
    scenes with one object.

    Returns:
        By factor, the share of correct votes and the share of the most frequent answer.
    """
    rng = random.Random("study control")
    scenes = [independent_scene(rng, number) for number in _INDEPENDENT * 2]
    vectors = F.normalize(features_of(root, [render(scene) for scene in scenes]), dim=-1)
    half, found = len(_INDEPENDENT), {}
    for factor in ("count", "color", "shape", "size"):
        count = factor == "count"
        labels = [len(scene.objects) if count else getattr(scene.objects[0], factor) for scene in scenes]
        known = torch.tensor([row for row in range(half) if count or len(scenes[row].objects) == 1])
        nearest = known[(vectors[known + half] @ vectors[known].T).topk(_VOTERS).indices]
        votes = [[labels[row] for row in rows] for rows in nearest.tolist()]
        truth = [labels[row + half] for row in known.tolist()]
        right = sum(max(vote, key=vote.count) == answer for vote, answer in zip(votes, truth, strict=True))
        found[factor] = (right / len(truth), max(map(truth.count, set(truth))) / len(truth))
    return found


def independent_scene(rng: random.Random, number: int) -> Scene:
    """Draws a scene of ``number`` objects whose shape, color, size and cell are independent and uniform."""
    cells = sorted(rng.sample(range(GRID**2), number))
    objects = [
        place(rng, rng.choice(SHAPES), rng.choice(tuple(PALETTE)), rng.choice(SIZES), *divmod(cell, GRID))
        for cell in cells
    ]
    return Scene(tuple(objects), background=rng.randint(20, 70))


def identity_tower() -> SiglipVisionModel:
    """Makes an untrained vision tower: each token contains the pixels of its patch and the number of the patch."""
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
        for name, parameter in tower.named_parameters():  # mostly zeros, so that the layer adds nothing to its input
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if name.endswith("patch_embedding.weight"):
                parameter[:n_pixels] = torch.eye(n_pixels).unflatten(1, parameter.shape[1:])
            if name.endswith("position_embedding.weight"):
                parameter[:, n_pixels:] = 8 * torch.eye(n_patches)
    return tower.eval()


def make_llava(root: Path, world: World, settings: Settings, seed: int) -> None:
    """Makes a seed's LLaVA from a random projector and a language model trained only on text."""
    tokenizer = AutoTokenizer.from_pretrained(root / TOKENIZER)
    with models.reproducible(seed):
        language_model = models.new_language_model(tokenizer, head_dim=12, intermediate_size=160)
        models.train_language_model(language_model, tokenizer, world.texts, settings.language_steps)
        llava = models.assemble_llava(language_model, identity_tower(), tokenizer)
    for part in llava:
        part.save_pretrained(root / LLAVA.format(seed))


def load_llava(root: Path, seed: int) -> tuple[Any, Any]:
    """Loads a seed's LLaVA, from which all runs with this seed start, and its processor."""
    folder = root / LLAVA.format(seed)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
