"""The demo: captions and answers are true of the pixels, splits are disjoint, and a build is reproducible and safe."""

import hashlib
import json
import random
import runpy
from pathlib import Path

import pytest
from PIL import Image

from recipes.demo import build
from recipes.demo.dataset import Amounts
from recipes.demo.scenes import HELD_OUT_COLOR, caption, render, sample_scene, split_questions
from tests.e2e.runner import ROOT

from .scene_reader import WORDS, answer, holds, read, read_caption

SPLITS = ("train", "held_out")
HELD_OUT = {(color, shape) for shape, color in HELD_OUT_COLOR.items()}
FEW = build.Size(Amounts(6, 2, 2), Amounts(2, 1, 1), language_steps=3, vision_steps=3, teacher_steps=3)


def scenes(split: str, count: int) -> list:
    rng = random.Random(f"test {split}")
    return [sample_scene(rng, split) for _ in range(count)]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_and_answers_are_true_of_the_pixels(split):
    rng = random.Random(1)
    for scene in scenes(split, 300):
        seen = read(render(scene))
        claimed, relations, count = read_caption(caption(scene, rng))
        assert claimed == {(item.size, item.color, item.shape, item.place) for item in seen}
        assert len(seen) == len(scene.objects)
        assert count in (None, WORDS[len(seen)])
        for first, relation, second in relations:
            (a,) = [item for item in seen if item.fits(first)]
            (b,) = [item for item in seen if item.fits(second)]
            assert holds(a, relation, b)
        for question in split_questions(scene, split):
            assert question.answer == answer(seen, question.text), question


def test_every_held_out_scene_and_no_training_scene_or_text_has_a_reserved_pair_of_color_and_shape():
    rng = random.Random(2)
    assert all({item.pair for item in scene.objects} & HELD_OUT for scene in scenes("held_out", 200))
    for scene in scenes("train", 300):
        assert not {item.pair for item in scene.objects} & HELD_OUT
        text = " ".join(f"{q.text} {q.answer}" for q in split_questions(scene, "train")) + caption(scene, rng)
        assert not [pair for pair in HELD_OUT if " ".join(pair) in text]


def test_splits_share_no_image(world):
    data = world / "hera_demo/data"

    def pixels(split: str) -> set[bytes]:
        rows = json.loads((data / f"demo_{split}.json").read_text())
        return {Image.open(data / row["images"][0]).tobytes() for row in rows}

    assert not pixels("train") & pixels("heldout")


def contents(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(copy_demo, tmp_path):
    built = build.build_demo(tmp_path / "hera_demo", size="test")["root"]
    assert contents(built) == contents(copy_demo(tmp_path / "other") / "hera_demo")


def test_only_force_replaces_a_demo_and_nothing_replaces_another_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(build.SIZES, "test", FEW)
    root = build.build_demo(tmp_path / "hera_demo", size="test")["root"]
    before = contents(root)
    with pytest.raises(ValueError, match=r"contains a different demo .* --force"):
        build.build_demo(root, seed=1, size="test")
    build.build_demo(root, size="test")
    assert contents(root) == before
    build.build_demo(root, seed=1, size="test", force=True)
    assert contents(root)["teacher/model.safetensors"] != before["teacher/model.safetensors"]
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.txt").touch()
    with pytest.raises(ValueError, match=r"work exists and contains no demo; choose another folder"):
        build.build_demo(tmp_path / "work", size="test", force=True)


def test_a_folder_that_cannot_be_written_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--size", "test", "--output", "/proc/nothing/demo"])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(ROOT / "recipes/demo"), run_name="__main__")
    assert capsys.readouterr().err.startswith("demo: [Errno 2] ")


def test_a_link_is_followed_and_any_integer_is_a_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(build.SIZES, "test", FEW)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    build.build_demo(tmp_path / "link", seed=10**20, size="test")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target/demo.json").is_file()
