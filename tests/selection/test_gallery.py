"""The gallery of nearest images: frames, shares, images of each file, and input that cannot be drawn."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llamafactory_hera.files import write_safetensors
from llamafactory_hera.heads import Target
from llamafactory_hera.plots import render
from llamafactory_hera.selection.gallery import Neighbors, draw_gallery, write_gallery
from llamafactory_hera.selection.scores import load_files
from tests.tiny_models import image_files

from .tiny import write_scores

BEFORE = [[0.3, 0.1], [math.nan, 0.5], [0.2, 0.4]]
N, K, QUERIES = 9, 4, 3


def neighbors_file(scores: Path) -> Path:
    return scores.with_suffix(".neighbors.safetensors")


def write_seen(scores: Path, images: Path, seed: int, heads: int = 2, layers: int = 3) -> Path:
    """Writes the neighbors file of a selection; the teacher's neighbors are the same for every seed."""

    def drawn(count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([torch.randperm(N, generator=generator)[:K] for _ in range(count)]).int()

    images.mkdir(exist_ok=True)
    caption = r"$\q$, a caption of a wide image: WWWWWWWWW MMMMMMMM"
    samples = {index: [path, f"{index}: {caption}"] for index, path in enumerate(image_files(images, N))}
    of_heads = drawn(layers * heads * QUERIES, seed).view(layers, heads, QUERIES, K)
    of_heads[1, 0] = -1  # no score
    tensors = {"queries": torch.tensor([0, 4, 8]).int(), "teacher": drawn(QUERIES, 0), "heads": of_heads}
    write_safetensors(neighbors_file(scores), tensors, {"samples": json.dumps(samples)})
    return scores


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """The scores before and after training."""
    paths = [tmp_path / "run/hera/heads.json", tmp_path / "run/hera/scores.json"]
    return [write_seen(write_scores(path, BEFORE), tmp_path / "images", seed) for seed, path in enumerate(paths, 1)]


@pytest.mark.parametrize("head", [Target(0, 1), Target(1, 0)], ids=str)
def test_an_image_has_a_frame_exactly_if_teacher_and_head_agree(files, head):
    (axes,) = draw_gallery(*load_files(files, (), "gallery"), head).axes
    held = [Neighbors.load(path) for path in files]
    agreed = [
        (side, row, place)
        for side, neighbors in enumerate(held)
        for row in range(QUERIES)
        for place in range(K)
        if neighbors.heads[head][row, place] in neighbors.teacher[row]
    ]
    assert bool(agreed) == (head != Target(1, 0))
    # the images of the queries, of the teacher, and of each file, row by row
    corners = [(image.get_extent()[0], image.get_extent()[3]) for image in axes.images]
    frames = [(frame.get_x(), frame.get_y()) for frame in axes.patches]
    assert len(corners) == QUERIES * (1 + K + (2 * K if agreed else 0))
    assert frames == [corners[QUERIES * (1 + K) + (side * QUERIES + row) * K + place] for side, row, place in agreed]
    shares = [text.get_text() for text in axes.texts if text.get_text().replace(".", "").isdigit()]
    counts = [sum(found[:2] == (side, row) for found in agreed) for side in range(2) for row in range(QUERIES)]
    assert shares == [f"{count / K:.2f}" for count in counts]


def test_the_images_of_each_file_are_drawn(files):
    path, held = neighbors_file(files[1]), Neighbors.load(files[1])
    tensors = load_file(path)
    tensors["heads"][0, 1, 0, 0] = N
    write_safetensors(path, tensors, {"samples": json.dumps(held.samples | {N: held.samples["0"]})})
    (axes,) = draw_gallery(*load_files(files, (), "gallery"), Target(0, 1)).axes
    assert len(axes.images) == QUERIES * (1 + 3 * K)


def test_the_worst_the_median_and_the_best_head_of_the_first_file_are_drawn(files, tmp_path):
    pictures = write_gallery(files, tmp_path / "new/seen", ["a", "b"])
    assert [path.name for path in pictures] == ["seen_L0H1.png", "seen_L0H0.png", "seen_L1H1.png"]
    assert sorted(pictures) == sorted((tmp_path / "new").iterdir())


def test_a_small_picture_shows_two_queries_in_the_first_file_and_the_last_two(files, tmp_path):
    (axes,) = draw_gallery(*load_files([*files, *files], "abcd", "gallery"), Target(0, 1), small=True).axes
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["query", "teacher", "a", "c", "d"]
    assert len(axes.images) == 2 * (1 + 4 * 4)
    assert write_gallery(files, tmp_path / "small", small=True) == [tmp_path / "small.png"]


def test_captions_of_five_files_do_not_overlap(files):
    figure = draw_gallery(*load_files([files[0], *files, *files], (), "gallery"), Target(0, 1))
    render(figure)
    (axes,) = figure.axes
    captions = [text.get_window_extent() for text in axes.texts if text.get_fontsize() == 5]
    rows = {row: sorted(box.x0 for box in captions if box.y0 == row) for row in {box.y0 for box in captions}}
    widest = max(box.width for box in captions)
    assert all(right - left > widest for starts in rows.values() for left, right in itertools.pairwise(starts))


def test_missing_images_and_neighbors_are_refused(files, tmp_path):
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(ValueError, match=r"The image file .*0\.png' cannot be read"):
        write_gallery(files, tmp_path / "seen", heads="L0H1")
    neighbors_file(files[1]).unlink()
    with pytest.raises(ValueError, match=r"scores\.neighbors\.safetensors cannot be read"):
        write_gallery(files, tmp_path / "seen", heads="L0H1")


@pytest.mark.parametrize(
    "harm", [{"teacher": None}, {"heads": torch.zeros(3, 2, 9, 9)}, {"queries": torch.tensor([99])}]
)
def test_a_file_of_neighbors_with_other_content_is_refused(files, harm):
    path, held = neighbors_file(files[0]), Neighbors.load(files[0])
    tensors = {name: tensor for name, tensor in (load_file(path) | harm).items() if tensor is not None}
    write_safetensors(path, tensors, {"samples": json.dumps(held.samples)})
    with pytest.raises(ValueError, match=r"neighbors\.safetensors is not a file of neighbors that a selection wrote"):
        Neighbors.load(files[0])


def test_a_picture_of_another_program_is_not_replaced(files, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    with pytest.raises(ValueError, match=r"mine\.png exists and is not"):
        write_gallery(files, tmp_path / "mine", small=True)
    assert write_gallery(files, tmp_path / "own", small=True) == write_gallery(files, tmp_path / "own", small=True)


@pytest.mark.parametrize("head", ["L3H0", "L0H2", "L1H0"])
def test_a_head_without_a_score_is_refused(files, tmp_path, head):
    with pytest.raises(ValueError, match=f"gallery: {head} has no score in .*heads.json"):
        write_gallery(files, tmp_path / "seen", heads=head)
