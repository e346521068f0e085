"""The demo's dataset in LLaMA-Factory's sharegpt format, as files.

Written into one folder, which is the host's ``dataset_dir``; image names are relative to it (the host looks them up in
``media_dir``, by default the same folder):

- ``dataset_info.json`` names four datasets: ``hera_demo`` (training conversations: some questions, and a caption
  before or after them), ``hera_demo_heldout`` (the same on held-out images, caption always last),
  ``hera_demo_captions`` (the training images, each with its caption alone: stage 1 and head selection) and
  ``hera_demo_text`` (no images).
- ``images/*.png``.
- ``factors.json``: what each image shows, and the category of every question, for evaluation; nothing trains on it.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .photos import CaptionedImage, digits, photographs
from .scene_text import NUMBERS, Question, caption, pick_questions
from .scenes import Split, World, render

QUESTIONS_PER_SCENE = 3
DESCRIBE = ("Describe the picture.", "What do you see?", "What is shown here?")


@dataclass(frozen=True)
class Amounts:
    """How many images of each kind one split has."""

    scenes: int
    digits: int
    photographs: int


@dataclass(frozen=True)
class Sample:
    """One image with everything that is said about it, and what it shows (``factors``)."""

    name: str
    image: Image.Image
    caption: str
    questions: tuple[Question, ...]
    factors: dict[str, Any]

    def messages(self, rng: random.Random, caption_first: bool) -> list[dict[str, str]]:
        """The conversation; with the caption last, no answer can be copied from it."""
        description = (rng.choice(DESCRIBE), self.caption)
        asked = [(question.text, question.answer) for question in self.questions]
        turns = [description, *asked] if caption_first else [*asked, description]
        return conversation([("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]])


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Question-answer pairs as a list of messages."""
    roles = (("user", question, "assistant", answer) for question, answer in turns)
    return [
        message
        for user, question, assistant, answer in roles
        for message in ({"role": user, "content": question}, {"role": assistant, "content": answer})
    ]


def make_samples(world: World, train: Amounts, held_out: Amounts, seed: int) -> dict[Split, list[Sample]]:
    """Draw all images of both splits, each split in random order."""
    real_digits = digits(train.digits, held_out.digits, random.Random(f"digits {seed}"))
    samples: dict[Split, list[Sample]] = {}
    for split, amounts in (("train", train), ("held_out", held_out)):
        rng = random.Random(f"{split} {seed}")
        made = [_scene_sample(world, rng, split, i) for i in range(amounts.scenes)]
        made += [_real_sample("digit", split, i, item) for i, item in enumerate(real_digits[split])]
        photos = photographs(amounts.photographs, rng, split)
        made += [_real_sample("photograph", split, i, item) for i, item in enumerate(photos)]
        rng.shuffle(made)
        samples[split] = made
    return samples


def _scene_sample(world: World, rng: random.Random, split: Split, number: int) -> Sample:
    scene = world.sample(rng, split)
    picked = tuple(pick_questions(world, scene, rng, QUESTIONS_PER_SCENE, split))
    factors = {"kind": "scene", "split": split, "scene": asdict(scene)}
    return Sample(f"{split}_scene_{number:05d}.png", render(world, scene), caption(world, scene, rng), picked, factors)


def _real_sample(kind: str, split: Split, number: int, item: CaptionedImage) -> Sample:
    picked = tuple(Question(kind, text, answer) for text, answer in item.questions)
    factors = {"kind": kind, "split": split, "subject": item.subject}
    return Sample(f"{split}_{kind}_{number:05d}.png", item.image, item.caption, picked, factors)


def text_conversations(rng: random.Random) -> list[list[dict[str, str]]]:
    """Conversations without an image: sums and comparisons of small numbers, in words."""
    turns = []
    for i, first in enumerate(NUMBERS):
        for j, second in enumerate(NUMBERS):
            if i + j < len(NUMBERS):
                turns.append((f"What is {first} plus {second}?", NUMBERS[i + j]))
            if i != j:
                turns.append((f"Which is more, {first} or {second}?", NUMBERS[max(i, j)]))
    rng.shuffle(turns)
    return [conversation(turns[i : i + 2]) for i in range(0, len(turns) - 1, 2)]


def write_dataset(folder: Path, samples: dict[Split, list[Sample]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Write images, conversations, ``dataset_info.json`` and ``factors.json``.

    Returns:
        The rows of each dataset by name.
    """
    rng = random.Random(f"conversations {seed}")
    (folder / "images").mkdir(parents=True)
    for split in samples.values():
        for sample in split:
            sample.image.save(folder / "images" / sample.name)

    def row(sample: Sample, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"messages": messages, "images": [f"images/{sample.name}"]}

    rows = {
        "hera_demo": [row(s, s.messages(rng, caption_first=rng.random() < 0.5)) for s in samples["train"]],
        "hera_demo_heldout": [row(s, s.messages(rng, caption_first=False)) for s in samples["held_out"]],
        "hera_demo_captions": [row(s, conversation([("<image>", s.caption)])) for s in samples["train"]],
        "hera_demo_text": [{"messages": messages} for messages in text_conversations(rng)],
    }
    files = {
        "hera_demo": "demo_train.json",
        "hera_demo_heldout": "demo_heldout.json",
        "hera_demo_captions": "demo_captions.json",
        "hera_demo_text": "demo_text.json",
    }
    for name, file in files.items():
        write_json(folder / file, rows[name])
    write_json(folder / "dataset_info.json", {name: _entry(name, file) for name, file in files.items()})
    factors = {
        f"images/{s.name}": s.factors | {"questions": [asdict(question) for question in s.questions]}
        for split in samples.values()
        for s in split
    }
    write_json(folder / "factors.json", factors)
    return rows


def _entry(name: str, file: str) -> dict[str, Any]:
    columns = {"messages": "messages"} | ({} if name == "hera_demo_text" else {"images": "images"})
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": tags}


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
