"""Datasets of emoji and their Unicode names, and the vision tower and the teacher that are trained on the images."""

import random
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.teachers.encoder import VisionTeacher
from recipes.demo import models

_SIDE, _HELD_OUT, _HALF = 64, 344, 600
_FONT = Path("usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_PACKAGE, _SIZE = "fonts-noto-color-emoji", 109  # the font's only bitmap size
_LEAST, _NEIGHBORS = 4, 10  # see `write_knowledge`; the number of nearest neighbors that vote


def write_data(folder: Path) -> None:
    """Writes a ``dataset_dir``, with the same content every time.

    Models train on ``emoji`` and never on an image of ``heldout``. Heads are scored on ``half_a`` and ``half_b``, two
    disjoint sets that are drawn from all emoji, including the held-out ones.
    """
    (folder / "images").mkdir(parents=True)
    rng, emoji, info = random.Random(0), draw_emoji(), {}
    names = rng.sample(sorted(emoji), len(emoji))
    parts = {"heldout": names[:_HELD_OUT], "emoji": names[_HELD_OUT:]}
    names = rng.sample(names, 2 * _HALF)
    parts |= {"half_a": names[:_HALF], "half_b": names[_HALF:]}
    columns = {"prompt": "prompt", "response": "response", "images": "images"}
    for dataset, part in parts.items():
        rows = [{"prompt": "<image>", "response": name, "images": [f"images/{name}.png"]} for name in part]
        write_json(folder / f"{dataset}.json", rows)
        info[dataset] = {"file_name": f"{dataset}.json", "columns": columns}
    for name, image in emoji.items():
        image.save(folder / f"images/{name}.png")
    write_json(folder / "dataset_info.json", info)


def draw_emoji(root: Path = Path("/")) -> dict[str, Image.Image]:
    """Draws each emoji with one code point on white; returns the images by lower-case name.

    Raises:
        ValueError: The font is not installed under ``root`` and cannot be fetched from Debian.
    """
    font, drawn = root / _FONT, {}
    with TemporaryDirectory() as folder:
        if not font.is_file():
            fetch = f"apt-get download {_PACKAGE} && dpkg-deb -x {_PACKAGE}_*.deb ."
            done = subprocess.run(fetch, shell=True, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                error = " ".join(done.stderr.split())[-200:]
                raise ValueError(f"{font} is missing ({error}); run `apt-get update && apt-get install {_PACKAGE}`.")
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


def train(data: Path, folder: Path, name: Path) -> None:
    """Trains the vision tower as a masked autoencoder, or the teacher as a ``Dinov2Model`` with SimCLR's loss.

    The tower also serves as the second teacher.
    """
    torch.manual_seed(0)
    images, _ = _load(data, "emoji")
    if str(name) == "tower":
        trained = models.train_vision_tower(images, 600, models.Encoder(_SIDE, 16, width=192, layers=6, rate=1e-3))
    else:
        trained = models.train_teacher(images, 400, view, models.Encoder(_SIDE, 8, width=128, layers=4, rate=1e-3))
    for part in trained[:2]:
        part.save_pretrained(folder)


def view(pixels: torch.Tensor) -> torch.Tensor:
    """Crops each image to at least half its side length, and changes or removes its colors; keeps ``[B, 3, S, S]``."""
    affine = torch.zeros(len(pixels), 2, 3)
    scale = torch.empty(len(pixels)).uniform_(0.5, 1.0)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = (1 - scale)[:, None] * torch.empty(len(pixels), 2).uniform_(-1, 1)
    cut = F.grid_sample(pixels, F.affine_grid(affine, list(pixels.shape), align_corners=False), align_corners=False)
    gray = torch.rand(len(pixels), 1, 1, 1) < 0.3
    return models.random_view(torch.where(gray, cut.mean(dim=1, keepdim=True), cut))


def write_knowledge(data: Path, folder: Path, *encoders: Path) -> None:
    """Measures how well the nearest training images predict the last word of a held-out name (face, symbol, heart, …).

    Only usual last words count: those in which at least ``_LEAST`` training names end. ``knowledge.json`` holds,
    for each encoder, its accuracy, the accuracy of always guessing the most frequent word, and the number of
    held-out images with a usual word.
    """
    (images, words), (others, truth) = (_load(data, dataset) for dataset in ("emoji", "heldout"))
    usual, found = [i for i, word in enumerate(truth) if words.count(word) >= _LEAST], {}
    most = Counter(truth[i] for i in usual).most_common(1)[0][1]
    for path in encoders:
        encoder = VisionTeacher.from_pretrained(str(path), "cpu", torch.float32)
        vectors, queries = (F.normalize(encoder.encode(encoder.processor.batch(it))) for it in (images, others))
        votes = [[words[n] for n in near] for near in (queries @ vectors.T).topk(_NEIGHBORS).indices.tolist()]
        right = sum(max(votes[i], key=votes[i].count) == truth[i] for i in usual)
        found[path.name] = (right / len(usual), most / len(usual), len(usual))
    write_json(folder / "knowledge.json", found)


def _load(data: Path, dataset: str) -> tuple[list[Image.Image], list[str]]:
    """Loads a dataset's images and the last words of their names."""
    rows = read_json(data / f"{dataset}.json")
    words = [row["response"].split()[-1] for row in rows]
    return [Image.open(data / row["images"][0]) for row in rows], words
