"""What a head sees: hits, what is drawn for whom, and input that cannot be drawn."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_hera.files import write_safetensors
from llamafactory_hera.heads import Target
from llamafactory_hera.selection.gallery import Neighbors, default_targets, draw_gallery, neighbors_file, write_gallery
from llamafactory_hera.selection.scores import load_files

from .tiny import noise_images, write_scores

BEFORE = [[0.3, 0.1], [math.nan, 0.5], [0.2, 0.4]]
N, K, QUERIES = 9, 4, 3


def write_seen(scores: Path, images: Path, seed: int) -> Path:
    """Neighbors as a selection keeps them: the teacher's are the same in every file, those of heads depend on it."""

    def drawn(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(count)]).int()

    images.mkdir(exist_ok=True)
    samples = {}
    for index, image in enumerate(noise_images(N)):
        image.save(images / f"{index}.png")
        samples[index] = [str(images / f"{index}.png"), rf"{index}: $\q$, a caption"]
    heads = drawn(6 * QUERIES, seed).view(3, 2, QUERIES, K)
    heads[1, 0] = -1  # could not be scored
    tensors = {"queries": torch.tensor([0, 4, 8]).int(), "teacher": drawn(QUERIES, 0), "heads": heads}
    tensors["layers"] = drawn(3 * QUERIES, seed + 1).view(3, QUERIES, K)
    write_safetensors(neighbors_file(scores), tensors, {"samples": json.dumps(samples)})
    return scores


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Before and after."""
    paths = [tmp_path / "run/hera/heads.json", tmp_path / "run/hera/scores.json"]
    return [write_seen(write_scores(path, BEFORE), tmp_path / "images", seed) for seed, path in enumerate(paths, 1)]


@pytest.mark.parametrize("target", [Target(0, 1), Target(1, 0), Target(2)], ids=str)
def test_an_image_is_framed_exactly_where_teacher_and_head_agree(files, target):
    figure = draw_gallery(*load_files(files, (), "gallery"), target)
    (axes,) = figure.axes
    held = [Neighbors.load(path) for path in files]
    agreed = [
        (row, side, place)
        for row in range(QUERIES)
        for side, of_file in enumerate(held)
        for place in range(K)
        if of_file.of(target)[row, place] in of_file.teacher[row]
    ]
    assert bool(agreed) == (target != Target(1, 0))
    # every image by its place: a query, the teacher's, and those of each file
    corners = [(image.get_extent()[0], image.get_extent()[3]) for image in axes.images]
    frames = [(frame.get_x(), frame.get_y()) for frame in axes.patches]
    per_file = K if agreed else 0  # a head that could not be scored has no images
    per_row = 1 + K + 2 * per_file
    assert len(corners) == QUERIES * per_row
    places = [corners[row * per_row + 1 + K + side * per_file + place] for row, side, place in agreed]
    assert sorted(frames) == sorted(places)
    shares = [text.get_text() for text in axes.texts if text.get_text().replace(".", "").isdigit()]
    counts = [sum(found[:2] == (row, side) for found in agreed) for row in range(QUERIES) for side in range(2)]
    assert shares == [f"{count / K:.2f}" for count in counts]


def test_each_file_brings_the_images_of_its_own_neighbors(files):
    path, held = neighbors_file(files[1]), Neighbors.load(files[1])
    tensors = load_file(path)
    tensors["heads"][0, 1, 0, 0] = N
    write_safetensors(path, tensors, {"samples": json.dumps(held.samples | {N: held.samples["0"]})})
    (axes,) = draw_gallery(*load_files(files, (), "gallery"), Target(0, 1)).axes
    assert len(axes.images) == QUERIES * (1 + 3 * K)


def test_by_default_the_worst_the_median_and_the_best_of_the_first_file_are_drawn(files, tmp_path):
    (first, _), names = load_files(files, (), "gallery")
    assert list(map(str, default_targets(first))) == ["L0H1", "L0H0", "L1H1"]
    pictures = write_gallery(files, tmp_path / "new/seen", names)
    assert [path.name for path in pictures] == ["seen_L0H1.png", "seen_L0H0.png", "seen_L1H1.png"]
    assert sorted(pictures) == sorted((tmp_path / "new").iterdir())


def test_a_folder_stands_for_its_scores_and_one_file_is_enough(files, tmp_path):
    (scores,), _ = load_files([tmp_path / "run"], (), "gallery")
    assert scores.path == files[1]
    assert len(write_gallery([tmp_path / "run"], tmp_path / "x", targets="L2H0")) == 1


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: (run / "images/0.png").unlink(), "gallery: The image file .*0.png.*score again if images"),
        (lambda run: (run / "run/hera/scores.neighbors.safetensors").unlink(), "gallery: .*cannot be read.*score"),
        (lambda run: (run / "run/hera/scores.neighbors.safetensors").write_text("x"), "gallery: .*cannot be read"),
        (lambda run: (run / "seen_L0H1.png").mkdir(), "gallery: .*seen_L0H1.png cannot be written"),
    ],
    ids=["images moved", "neighbors deleted", "neighbors damaged", "no place"],
)
def test_what_cannot_be_drawn_is_named(files, tmp_path, harm, message):
    harm(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_gallery(files, tmp_path / "seen", targets="L0H1")


@pytest.mark.parametrize("head", ["L3H0", "L0H2", "L1H0"])
def test_a_head_that_is_not_there_or_not_scored_is_named(files, tmp_path, head):
    with pytest.raises(ValueError, match=f"gallery: {head} has no score in .*heads.json"):
        write_gallery(files, tmp_path / "seen", targets=head)


def test_a_folder_without_scores_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scores: .* cannot be read .*; give a file that `llamafactory-hera score`"):
        write_gallery([tmp_path])
