"""Emoji with their Unicode names and easy-VQA's shapes with its questions, as the host's datasets; nothing is drawn.

In one folder, the host's ``dataset_dir``: ``emoji`` and ``shapes`` to train on, ``emoji_heldout`` and
``shapes_heldout`` for what is measured, whose images no model here is trained on; ``half_a`` and ``half_b`` are
disjoint sets of emoji of both kinds, for scoring heads alone.
"""

import random
import subprocess
import unicodedata
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw, ImageFont

from llamafactory_hera.demo.dataset import TAGS, conversation
from llamafactory_hera.files import read_json, write_json

SIDE, HELD_OUT, HALF, SHAPES = 64, 344, 600, {"train": 2000, "test": 300}
KINDS, _FORMS = ("colour", "shape", "yes or no"), ("circle", "rectangle", "triangle")
_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
_PACKAGE, _SIZE = "fonts-noto-color-emoji", 109  # the one size of the font's pictures


def write_pictures(folder: Path) -> None:
    """Writes all images and datasets, the same every time."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, emoji, info = random.Random(0), draw_emoji(), {}
    names = rng.sample(sorted(emoji), len(emoji))
    named = [(f"emoji_{i:04}.png", emoji[name], "What is this?", name) for i, name in enumerate(names)]
    halves = rng.sample(named, 2 * HALF)
    rows = {
        "emoji": named[HELD_OUT:],
        "emoji_heldout": named[:HELD_OUT],
        "half_a": halves[:HALF],
        "half_b": halves[HALF:],
    }
    rows |= {"shapes": _shapes("train", rng), "shapes_heldout": _shapes("test", rng)}
    for dataset, content in rows.items():
        messages = []
        for file, image, question, answer in content:
            image.save(folder / "images" / file)
            turns = conversation([(f"<image>\n{question}", answer)])
            messages.append({"messages": turns, "images": [f"images/{file}"]})
        write_json(folder / f"{dataset}.json", messages)
        columns = {"messages": "messages", "images": "images"}
        info[dataset] = {"file_name": f"{dataset}.json", "formatting": "sharegpt", "columns": columns, "tags": TAGS}
    write_json(folder / "dataset_info.json", info)


def draw_emoji() -> dict[str, Image.Image]:
    """Each emoji of one code point by its name in small letters, on white.

    Raises:
        ValueError: Debian's package of the font is neither installed nor to be had.
    """
    font, drawn = Path("/", _FONT), {}
    with TemporaryDirectory() as folder:
        if not font.is_file():
            fetch = f"apt-get download {_PACKAGE} && dpkg-deb -x {_PACKAGE}_*.deb ."
            done = subprocess.run(fetch, shell=True, cwd=folder, capture_output=True, text=True)
            font = Path(folder, _FONT)
            if done.returncode:
                error = " ".join(done.stderr.split())[-200:]
                raise ValueError(f"/{_FONT} is missing ({error}); `apt-get update && apt-get install {_PACKAGE}`.")
        drawer = ImageFont.truetype(font, _SIZE)
        for character in map(chr, range(0x203C, 0x1FB00)):
            name = unicodedata.name(character, "")
            if unicodedata.category(character) == "So" and not name.startswith("REGIONAL"):
                image = Image.new("RGB", (136, 136), "white")
                ImageDraw.Draw(image).text((0, 0), character, font=drawer, embedded_color=True)
                if image.getextrema() != ((255, 255),) * 3:
                    drawn[name.lower()] = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return drawn


def _shapes(split: str, rng: random.Random) -> list[tuple[str, Image.Image, str, str]]:
    """A question about each of so many of easy-VQA's images: for its colour, for its shape, yes or no, in turn."""
    folder, rows = Path(str(files("easy_vqa")), "data", split), []
    asked: dict[int, dict[str, list[tuple[str, str]]]] = {}
    for text, answer, number in read_json(folder / "questions.json"):
        asked.setdefault(number, {}).setdefault(kind_of(answer), []).append((text, answer))
    complete = sorted(number for number, kinds in asked.items() if len(kinds) == len(KINDS))
    for i, number in enumerate(rng.sample(complete, SHAPES[split])):
        image = Image.open(folder / "images" / f"{number}.png").convert("RGB")
        rows.append((f"{split}_{i:04}.png", image, *rng.choice(asked[number][KINDS[i % len(KINDS)]])))
    return rows


def kind_of(answer: str) -> str:
    """What a question of easy-VQA asks for, by its answer."""
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in _FORMS else "colour"
