"""Emoji with their Unicode names as the host's datasets; the tower and the teacher trained on their images alone."""

import random
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from llamafactory_hera.demo import models
from llamafactory_hera.demo.dataset import TAGS, conversation
from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.teachers.encoder import VisionTeacher

_SIDE, _HELD_OUT, _HALF = 64, 344, 600
_FONT = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_PACKAGE, _SIZE = "fonts-noto-color-emoji", 109  # the one size of the font's pictures
_TOWER = models.Encoder(_SIDE, patch=16, width=192, layers=6, rate=1e-3)
_TEACHER = models.Encoder(_SIDE, patch=8, width=128, layers=4, rate=1e-3)
_TOWER_STEPS, _TEACHER_STEPS = 600, 400
_GREY = 0.3
_LEAST, _NEIGHBOURS = 8, 10  # training emoji whose names end alike; neighbours that vote


def write_data(folder: Path) -> None:
    """Writes a ``dataset_dir``, the same every time.

    ``emoji`` is there to train on; no model here is trained on an image of ``heldout``. ``half_a`` and ``half_b`` are
    disjoint sets of both kinds, for scoring heads alone.
    """
    (folder / "images").mkdir(parents=True)
    rng, emoji, info = random.Random(0), draw_emoji(), {}
    names = rng.sample(sorted(emoji), len(emoji))
    halves = rng.sample(names, 2 * _HALF)
    parts = {
        "emoji": names[_HELD_OUT:],
        "heldout": names[:_HELD_OUT],
        "half_a": halves[:_HALF],
        "half_b": halves[_HALF:],
    }
    for dataset, part in parts.items():
        rows = []
        for name in part:
            file = f"images/{name.replace(' ', '_')}.png"
            emoji[name].save(folder / file)
            rows.append({"messages": conversation([("<image>\nWhat is this?", name)]), "images": [file]})
        write_json(folder / f"{dataset}.json", rows)
        columns = {"messages": "messages", "images": "images"}
        info[dataset] = {"file_name": f"{dataset}.json", "formatting": "sharegpt", "columns": columns, "tags": TAGS}
    write_json(folder / "dataset_info.json", info)


def draw_emoji(root: Path = Path("/")) -> dict[str, Image.Image]:
    """Each emoji of one code point by its name in small letters, on white.

    Raises:
        ValueError: The font is neither installed under ``root`` nor to be had from Debian.
    """
    font, drawn = root / _FONT, {}
    with TemporaryDirectory() as folder:
        if not font.is_file():
            fetch = f"apt-get download {_PACKAGE} && dpkg-deb -x {_PACKAGE}_*.deb ."
            done = subprocess.run(fetch, shell=True, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                error = " ".join(done.stderr.split())[-200:]
                raise ValueError(f"{font} is missing ({error}); `apt-get update && apt-get install {_PACKAGE}`.")
            font = folder / _FONT
        drawer = ImageFont.truetype(font, _SIZE)
        for character in map(chr, range(0x203C, 0x1FB00)):
            name = unicodedata.name(character, "")
            if unicodedata.category(character) == "So" and not name.startswith("REGIONAL"):
                image = Image.new("RGB", (136, 136), "white")
                ImageDraw.Draw(image).text((0, 0), character, font=drawer, embedded_color=True)
                if image.getextrema() != ((255, 255),) * 3:
                    drawn[name.lower()] = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return drawn


def train_tower(data: Path, folder: Path) -> None:
    """A masked autoencoder, which is the second teacher, too."""
    torch.manual_seed(0)
    _save(folder, models.train_vision_tower(_images(data, read_json(data / "emoji.json")), _TOWER_STEPS, _TOWER))


def train_teacher(data: Path, folder: Path) -> None:
    """DINOv2's architecture, trained by contrast."""
    torch.manual_seed(0)
    images = _images(data, read_json(data / "emoji.json"))
    _save(folder, models.train_teacher(images, _TEACHER_STEPS, view, _TEACHER))


def view(pixels: torch.Tensor) -> torch.Tensor:
    """A random part of every image, half of its sides at least, in other colours or none: [B, 3, S, S], the same."""
    affine = torch.zeros(len(pixels), 2, 3)
    scale = torch.empty(len(pixels)).uniform_(0.5, 1.0)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = (1 - scale)[:, None] * torch.empty(len(pixels), 2).uniform_(-1, 1)
    cut = F.grid_sample(pixels, F.affine_grid(affine, list(pixels.shape), align_corners=False), align_corners=False)
    grey = torch.rand(len(pixels), 1, 1, 1) < _GREY
    return models.random_view(torch.where(grey, cut.mean(dim=1, keepdim=True), cut))


def write_knowledge(data: Path, encoders: Sequence[Path], folder: Path) -> None:
    """How well the nearest training images tell the last word of a held-out emoji's name (face, symbol, heart, …).

    Asked for are words in which enough names end. ``knowledge.json`` has each encoder's accuracy, that of the most
    frequent answer, and the number of images.
    """
    known, new = (read_json(data / f"{dataset}.json") for dataset in ("emoji", "heldout"))
    labels = [*map(_last_word, known)]
    counts = Counter(labels)
    new = [row for row in new if counts[_last_word(row)] >= _LEAST]
    truth, found = [_last_word(row) for row in new], {}
    for path in encoders:
        encoder = VisionTeacher.from_pretrained(str(path), "cpu", torch.float32)
        vectors, queries = (
            F.normalize(encoder.encode(encoder.processor.batch(_images(data, it)))) for it in (known, new)
        )
        nearest = (queries @ vectors.T).topk(_NEIGHBOURS).indices.tolist()
        votes = [[labels[i] for i in row] for row in nearest]
        right = sum(max(vote, key=vote.count) == word for vote, word in zip(votes, truth, strict=True))
        majority = Counter(truth).most_common(1)[0][1]
        found[path.name] = (right / len(truth), majority / len(truth), len(truth))
    write_json(folder / "knowledge.json", found)


def _images(data: Path, rows: list[dict[str, Any]]) -> list[Image.Image]:
    return [Image.open(data / row["images"][0]) for row in rows]


def _last_word(row: dict[str, Any]) -> str:
    return row["messages"][1]["content"].split()[-1]


def _save(folder: Path, trained: tuple[Any, Any, list[float]]) -> None:
    for part in trained[:2]:
        part.save_pretrained(folder)
    print(f"loss {trained[2][0]:.3f} -> {sum(trained[2][-20:]) / 20:.3f}")
