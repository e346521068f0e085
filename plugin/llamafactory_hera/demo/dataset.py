"""The demo's dataset in LLaMA-Factory's sharegpt format, as files.

Written into one folder, the host's ``dataset_dir`` and by default its ``media_dir``:

- ``dataset_info.json`` names ``hera_demo`` (training conversations: questions, and a caption before or after them),
  ``hera_demo_heldout`` (of held-out images, caption last), ``hera_demo_captions`` (the training images with captions
  alone: stage 1 and head selection) and ``hera_demo_text`` (no images).
- ``demo_questions.json``: the questions about held-out images, one a row, for `llamafactory-hera eval --suite demo`.
- ``images/*.png``: rendered scenes, and digits and photographs that scikit-learn and scikit-image carry. Held-out
  digits are other samples, held-out photographs share no pixel with training ones.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..files import write_json
from .scenes import NUMBERS, Question, Split, caption, pick_questions, render, sample_scene, split_questions

QUESTIONS_PER_SCENE = 3
DESCRIBE = ("Describe the picture.", "What do you see?", "What is shown here?")
DIGIT_SIDE, PHOTO_SIDE = 32, 64
#: The host's names for the parts of a sharegpt message.
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


class Amounts(NamedTuple):
    """How many images of each kind one split has."""

    scenes: int
    digits: int
    photographs: int


class Sample(NamedTuple):
    """One image with everything that is said about it."""

    name: str
    image: Image.Image
    caption: str
    questions: tuple[Question, ...]

    def messages(self, rng: random.Random, caption_first: bool) -> list[dict[str, str]]:
        """The conversation; with the caption last, no answer can be copied from it."""
        turns = [(question.text, question.answer) for question in self.questions]
        turns.insert(0 if caption_first else len(turns), (rng.choice(DESCRIBE), self.caption))
        return conversation([("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]])


def conversation(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Question-answer pairs as a list of messages."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


class Region(NamedTuple):
    """A part of a photograph."""

    source: str
    box: tuple[float, float, float, float]  # left, top, right, bottom, as fractions
    subject: str
    caption: str
    split: Split = "train"


def _texture(source: str, subject: str, caption: str) -> tuple[Region, Region]:
    """The left part of an even picture for training, the rest of it held out."""
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
_SUBJECTS = sorted({region.subject for region in REGIONS})
#: Of each kind of real image what it may show, and the questions for it.
_ASKED: dict[str, tuple[Sequence[str], str, str]] = {
    "photograph": (_SUBJECTS, "What is in this picture?", "Is this a picture of {}?"),
    "digit": (NUMBERS, "Which digit is this?", "Is this the digit {}?"),
}


def make_samples(train: Amounts, held_out: Amounts, seed: int) -> dict[Split, list[Sample]]:
    """Draws all images of both splits, each split in random order."""
    try:
        import skimage.data  # noqa: F401
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        remedy = 'the demo data needs scikit-learn and scikit-image: pip install "llamafactory-hera[demo]"'
        raise ImportError(f"{error}; {remedy}") from error
    samples = digits(train.digits, held_out.digits, random.Random(f"digits {seed}"))
    amounts: dict[Split, Amounts] = {"train": train, "held_out": held_out}
    for split, amount in amounts.items():
        rng = random.Random(f"{split} {seed}")
        made = []
        for number in range(amount.scenes):
            scene = sample_scene(rng, split)
            asked = tuple(pick_questions(split_questions(scene, split), rng, QUESTIONS_PER_SCENE))
            name = f"{split}_scene_{number:05d}.png"
            made.append(Sample(name, render(scene), caption(scene, rng), asked))
        samples[split] = made + samples[split] + photographs(amount.photographs, rng, split)
        rng.shuffle(samples[split])
    return samples


def photographs(count: int, rng: random.Random, split: Split) -> list[Sample]:
    """Square crops, every region in turn, of 80 to 100 % of its shorter side, scaled to ``PHOTO_SIDE`` pixels."""
    import skimage.data
    import sklearn.datasets

    @cache
    def load(source: str) -> Image.Image:
        of_sklearn = source in ("china", "flower")
        pixels = sklearn.datasets.load_sample_image(f"{source}.jpg") if of_sklearn else getattr(skimage.data, source)()
        return Image.fromarray(np.asarray(pixels)).convert("RGB")

    made = []
    for number, region in enumerate(islice(cycle(region for region in REGIONS if region.split == split), count)):
        photo = load(region.source)
        left, top, right, bottom = (round(part * side) for part, side in zip(region.box, photo.size * 2, strict=True))
        side = round(min(right - left, bottom - top) * rng.uniform(0.8, 1.0))
        x, y = rng.randint(left, right - side), rng.randint(top, bottom - side)
        image = photo.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        text = f"A photograph of {region.caption}."
        made.append(_real_sample("photograph", split, number, image, text, region.subject, rng))
    return made


def digits(train: int, held_out: int, rng: random.Random) -> dict[Split, list[Sample]]:
    """Handwritten digits of scikit-learn, scaled to ``DIGIT_SIDE`` pixels; no digit is in both splits."""
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    made: dict[Split, list[Sample]] = {"train": [], "held_out": []}
    for index in rng.sample(range(len(bunch.target)), train + held_out):
        split: Split = "train" if len(made["train"]) < train else "held_out"
        gray = Image.fromarray((bunch.images[index] * (255 / 16)).astype(np.uint8))
        image = gray.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).convert("RGB")
        word = NUMBERS[bunch.target[index]]
        text = f"A handwritten digit {word} in white on black."
        made[split].append(_real_sample("digit", split, len(made[split]), image, text, word, rng))
    return made


def _real_sample(
    kind: str, split: Split, number: int, image: Image.Image, text: str, shown: str, rng: random.Random
) -> Sample:
    """Asks what a real image shows, and whether it shows that or something else: "yes" as often as "no"."""
    names, open_question, closed_question = _ASKED[kind]
    other = rng.choice([name for name in names if name != shown])
    named, answer = rng.choice([(shown, "yes"), (other, "no")])
    asked = Question(kind, open_question, shown), Question(kind, closed_question.format(named), answer)
    return Sample(f"{split}_{kind}_{number:05d}.png", image, text, asked)


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
    """Writes images, conversations and ``dataset_info.json``; returns the rows of each dataset."""
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
    asked = [
        {"id": f"{sample.name}/{number}", "source": sample.name, "image": f"images/{sample.name}"}
        | {"question": question.text, "answer": question.answer, "category": question.category}
        for sample in samples["held_out"]
        for number, question in enumerate(sample.questions)
    ]
    write_json(folder / "demo_questions.json", asked, indent=1)
    return rows
