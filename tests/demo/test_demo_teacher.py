import random

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from llamafactory_hera.demo.scenes import World, render
from llamafactory_hera.demo.teacher import image_processor, new_teacher, random_view, train_teacher
from llamafactory_hera.demo.training import THREADS, reproducible


def shared_pairs(scenes) -> torch.Tensor:
    """Jaccard overlap of the (colour, shape) pairs of every two scenes: [N, N]."""
    pairs = [{item.pair for item in scene.objects} for scene in scenes]
    return torch.tensor([[len(a & b) / len(a | b) for b in pairs] for a in pairs])


def neighbour_overlap(teacher, pixels: torch.Tensor, overlap: torch.Tensor, k: int = 10) -> float:
    """Mean overlap of an image with its k nearest neighbours by the teacher's CLS token."""
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(teacher(pixels).last_hidden_state[:, 0], dim=-1)
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(k).indices
    return overlap.gather(1, nearest).mean().item()


def test_training_brings_images_of_the_same_things_together_without_being_told():
    world, rng = World(), random.Random("teacher")
    train = [world.sample(rng) for _ in range(192)]
    unseen = [world.sample(rng) for _ in range(128)]
    processor = image_processor()
    pixels, unseen_pixels = (
        processor([render(world, scene) for scene in scenes], return_tensors="pt")["pixel_values"]
        for scenes in (train, unseen)
    )
    overlap = shared_pairs(unseen)
    chance = (overlap.sum() - overlap.trace()) / (128 * 127)
    with reproducible(0):
        teacher = new_teacher().eval()
        before = neighbour_overlap(teacher, unseen_pixels, overlap)
        losses = train_teacher(teacher, pixels, steps=60, batch_size=64)
        after = neighbour_overlap(teacher, unseen_pixels, overlap)
    assert losses[-1] < 0.6 * losses[0]
    assert after > 1.7 * chance
    assert after > before + 0.03


def test_saved_teacher_loads_by_the_auto_classes_and_has_a_cls_token(demo):
    teacher = AutoModel.from_pretrained(demo["teacher"])
    processor = AutoImageProcessor.from_pretrained(demo["teacher"])
    assert type(teacher).__name__ == "Dinov2Model"
    assert type(processor).__name__.startswith("BitImageProcessor")
    world = World()
    image = render(world, world.sample(random.Random(0)))
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        assert teacher(pixels).last_hidden_state.shape == (1, 1 + 16, 64)


def test_views_keep_left_and_right_apart():
    pixels = torch.zeros(64, 3, 32, 32)
    pixels[:, :, 8:24, 2:10] = 3.0
    with reproducible(0):
        views = random_view(pixels).mean(1)
    assert (views[:, :, :16].mean((1, 2)) > views[:, :, 16:].mean((1, 2))).all()


def test_reproducible_leaves_the_callers_random_state_and_threads():
    drawn = []

    def fail() -> None:
        with reproducible(3):
            drawn.append((torch.rand(4), torch.get_num_threads()))
            raise KeyError

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(THREADS + 1)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == THREADS + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    with reproducible(3):
        assert torch.equal(torch.rand(4), drawn[0][0])
    assert drawn[0][1] == THREADS
