"""Writes the demo's dataset in LLaMA-Factory's sharegpt format to one folder.

- ``dataset_info.json`` declares four datasets. Each conversation in ``hera_demo`` asks about a training image, with a
  caption before or after the questions. ``hera_demo_heldout`` has held-out images, with the caption last.
  ``hera_demo_captions`` has the training images with only their captions, for stage 1 and the selection of heads.
  ``hera_demo_text`` has no images.
- ``demo_questions.json`` lists the questions about held-out images, for ``llamafactory-hera eval --suite demo``.
- ``images/*.png`` are rendered scenes, and digits and photographs from scikit-learn and scikit-image. No digit is in
  both splits, and held-out photographs share no pixel with training photographs.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llamafactory_hera.files import write_json

from .scenes import NUMBERS, Question, Split, caption, pick_questions, render, sample_scene, split_questions

try:
    import skimage.data
    import sklearn.datasets
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; run `pip install scikit-learn scikit-image`.") from error

QUESTIONS_PER_SCENE = 3
DESCRIBE = ("Describe the picture.", "What do you see?", "What is shown here?")
DIGIT_SIDE, PHOTO_SIDE = 32, 64
#: The names of the parts of a message, as ``dataset_info.json`` declares them.
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


class Amounts(NamedTuple):
    """The number of images of each kind in a split."""

    scenes: int
    digits: int
    photographs: int


class Sample(NamedTuple):
    """An image with its caption and its questions."""

    name: str
    image: Image.Image
    caption: str
    questions: tuple[Question, ...]

    def messages(self, rng: random.Random, caption_first: bool) -> list[dict[str, str]]:
        """Builds the conversation. If the caption comes last, no answer can be copied from it."""
        turns = [(question.text, question.answer) for question in self.questions]
        turns.insert(0 if caption_first else len(turns), (rng.choice(DESCRIBE), self.caption))
        return conversation([("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]])


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Converts question-answer pairs to a list of messages."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


class Region(NamedTuple):
    """A part of a photograph, with its subject and caption."""

    source: str
    box: tuple[float, float, float, float]  # left, top, right, bottom, as fractions
    subject: str
    caption: str
    split: Split = "train"


def _texture(source: str, subject: str, caption: str) -> tuple[Region, Region]:
    """Splits a picture of a uniform texture into a left part for training and a held-out right part."""
    left, right = (0.0, 0.0, 0.6, 1.0), (0.62, 0.0, 1.0, 1.0)
    return Region(source, left, subject, caption), Region(source, right, subject, caption, "held_out")


REGIONS: tuple[Region, ...] = (
    Region("astronaut", (0.1, 0.0, 0.75, 0.65), "an astronaut", "a smiling astronaut in an orange suit"),
    Region("astronaut", (0.55, 0.62, 1.0, 1.0), "a helmet", "a white helmet with a dark visor"),
    Region("camera", (0.05, 0.05, 0.75, 0.95), "a photographer", "a man in a dark coat behind a camera on a tripod"),
    Region("chelsea", (0.15, 0.0, 0.85, 1.0), "a cat", "the face of a ginger cat that looks at you"),
    Region("coffee", (0.1, 0.0, 0.85, 1.0), "a cup of coffee", "a cup of coffee on a red saucer with a spoon"),
    Region("rocket", (0.2, 0.05, 0.8, 1.0), "a rocket", "a white rocket against a dark blue sky"),
    Region("china", (0.05, 0.05, 0.62, 0.95), "a tower", "a red and green tower above the trees"),
    Region("flower", (0.22, 0.15, 0.75, 0.9), "a flower", "a round orange flower with many petals"),
    *_texture("brick", "a brick wall", "gray bricks in even rows"),
    *_texture("grass", "grass", "long blades of grass seen from above"),
    *_texture("gravel", "gravel", "many small gray stones"),
    *_texture("coins", "coins", "old coins in rows on a dark table"),
    *_texture("hubble_deep_field", "galaxies", "bright galaxies in a black sky"),
    *_texture("moon", "the moon", "the gray ground of the moon"),
    *_texture("immunohistochemistry", "tissue", "brown and blue tissue under a microscope"),
)
#: For each kind of real image: the possible subjects, the open question, and the yes-no question.
_REAL_QUESTIONS: dict[str, tuple[Sequence[str], str, str]] = {
    "photograph": (
        sorted({region.subject for region in REGIONS}),
        "What is in this picture?",
        "Is this a picture of {}?",
    ),
    "digit": (NUMBERS, "Which digit is this?", "Is this the digit {}?"),
}


def make_samples(train: Amounts, held_out: Amounts, seed: int) -> dict[Split, list[Sample]]:
    """Creates all samples of both splits, each split in random order."""
    samples = digits(train.digits, held_out.digits, random.Random(f"digits {seed}"))
    amounts: dict[Split, Amounts] = {"train": train, "held_out": held_out}
    for split, amount in amounts.items():
        rng = random.Random(f"{split} {seed}")
        scenes = []
        for number in range(amount.scenes):
            scene = sample_scene(rng, split)
            picked = tuple(pick_questions(split_questions(scene, split), rng, QUESTIONS_PER_SCENE))
            name = f"{split}_scene_{number:05d}.png"
            scenes.append(Sample(name, render(scene), caption(scene, rng), picked))
        samples[split] = scenes + samples[split] + photographs(amount.photographs, rng, split)
        rng.shuffle(samples[split])
    return samples


def photographs(count: int, rng: random.Random, split: Split) -> list[Sample]:
    """Crops squares from the regions of a split in turn, and scales them to ``PHOTO_SIDE`` pixels.

    A square's side is 80% to 100% of its region's shorter side.
    """

    @cache
    def load(source: str) -> Image.Image:
        in_sklearn = source in ("china", "flower")
        pixels = sklearn.datasets.load_sample_image(f"{source}.jpg") if in_sklearn else getattr(skimage.data, source)()
        return Image.fromarray(np.asarray(pixels)).convert("RGB")

    samples = []
    for number, region in enumerate(islice(cycle(region for region in REGIONS if region.split == split), count)):
        photo = load(region.source)
        left, top, right, bottom = (round(part * side) for part, side in zip(region.box, photo.size * 2, strict=True))
        side = round(min(right - left, bottom - top) * rng.uniform(0.8, 1.0))
        x, y = rng.randint(left, right - side), rng.randint(top, bottom - side)
        image = photo.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        text = f"A photograph of {region.caption}."
        samples.append(_real_sample("photograph", split, number, image, text, region.subject, rng))
    return samples


def digits(train: int, held_out: int, rng: random.Random) -> dict[Split, list[Sample]]:
    """Draws handwritten digits from scikit-learn, each for one split, and scales them to ``DIGIT_SIDE`` pixels."""
    bunch = sklearn.datasets.load_digits()
    samples: dict[Split, list[Sample]] = {"train": [], "held_out": []}
    for index in rng.sample(range(len(bunch.target)), train + held_out):
        split: Split = "train" if len(samples["train"]) < train else "held_out"
        gray = Image.fromarray((bunch.images[index] * (255 / 16)).astype(np.uint8))
        image = gray.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).convert("RGB")
        word = NUMBERS[bunch.target[index]]
        text = f"A handwritten digit {word} in white on black."
        samples[split].append(_real_sample("digit", split, len(samples[split]), image, text, word, rng))
    return samples


def _real_sample(
    kind: str, split: Split, number: int, image: Image.Image, text: str, subject: str, rng: random.Random
) -> Sample:
    """Adds the two questions to a real image; the answer to the yes-no question is "yes" as often as "no"."""
    subjects, open_question, closed_question = _REAL_QUESTIONS[kind]
    other = rng.choice([name for name in subjects if name != subject])
    named, answer = rng.choice([(subject, "yes"), (other, "no")])
    both = Question(kind, open_question, subject), Question(kind, closed_question.format(named), answer)
    return Sample(f"{split}_{kind}_{number:05d}.png", image, text, both)


def text_conversations(rng: random.Random) -> list[list[dict[str, str]]]:
    """Builds conversations without images about sums and comparisons of small numbers, written as words."""
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
    """Writes the images, the conversations and ``dataset_info.json``, and returns the rows of each dataset."""
    rng = random.Random(f"conversations {seed}")
    (folder / "images").mkdir(parents=True)
    for sample in (*samples["train"], *samples["held_out"]):
        sample.image.save(folder / "images" / sample.name)

    def row(sample: Sample, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"messages": messages, "images": [f"images/{sample.name}"]}

    rows = {
        "hera_demo": [row(s, s.messages(rng, caption_first=rng.random() < 0.5)) for s in samples["train"]],
        "hera_demo_heldout": [row(s, s.messages(rng, caption_first=False)) for s in samples["held_out"]],
        "hera_demo_captions": [row(s, conversation([("<image>", s.caption)])) for s in samples["train"]],
        "hera_demo_text": [{"messages": messages} for messages in text_conversations(rng)],
    }
    info = {}
    for name, content in rows.items():
        file = "demo_train.json" if name == "hera_demo" else f"{name.removeprefix('hera_')}.json"
        columns = {key: key for key in content[0]}
        info[name] = {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": TAGS}
        write_json(folder / file, content, indent=1)
    write_json(folder / "dataset_info.json", info, indent=1)
    questions = [
        {"id": f"{sample.name}/{number}", "source": sample.name, "image": f"images/{sample.name}"}
        | {"question": question.text, "answer": question.answer, "category": question.category}
        for sample in samples["held_out"]
        for number, question in enumerate(sample.questions)
    ]
    write_json(folder / "demo_questions.json", questions, indent=1)
    return rows
