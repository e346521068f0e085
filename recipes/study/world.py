"""The study's world: the demo's scenes, split three ways by what an object is and where it stands, and its files.

Every combination of shape, colour and cell belongs to one split. For a shape in a cell one colour is kept for the
test, another for validation, and four are for training; the two are never the shape's preferred colour, so that the
language prior is the same in every cell. A training scene holds training combinations alone. A scene of another split
holds at least one combination of that split and otherwise training combinations, and only objects of the former kind,
or the whole scene, are asked about. Every colour of a shape is seen in training, in other cells: what is asked for is
a new combination, and no training scene or caption answers it.

In one folder, which is the host's ``dataset_dir``:

- ``study_text``: text alone, for pre-training the language model: the training captions, and conversations in which
  a caption stands in the place of the image, so that the model can answer from what it reads before it sees.
- ``study_captions``: training images with their captions: stage 1, and head selection.
- ``study_train``: training images with one question each, several rows an image: stage 2.
- ``study_validation``, ``study_test``: one question on a held-out image each.
- ``study_validation_captions``, ``study_test_captions``: held-out images with captions, for scoring heads.
- ``key.json``: by held-out dataset and row, the image, category, question and answer.
- ``factors.json``: what each image shows. Nothing trains on these two.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from llamafactory_hera.demo.dataset import TAGS, conversation
from llamafactory_hera.demo.models import END_OF_TEXT, TURN_END, TURN_START
from llamafactory_hera.demo.scenes import (
    GRID,
    PALETTE,
    SHAPES,
    Question,
    Scene,
    SceneObject,
    all_pairs,
    caption,
    pick_questions,
    questions,
    render,
    sample_scene,
)
from llamafactory_hera.files import write_json
from settings import Settings

StudySplit = Literal["train", "validation", "test"]
TRAIN, CAPTIONS, TEXT = "study_train", "study_captions", "study_text"
#: ``trap``: the colour of a named shape that has not its preferred colour, so that the answer that is most likely from
#: the text alone is wrong. ``colour`` asks by place, where text alone has nothing to go by.
CATEGORIES = ("count", "colour", "shape", "where", "relation", "size", "exist", "trap")
QUESTIONS_PER_SCENE = 2  # of a held-out scene


def kept_colours(shape: str, row: int, column: int) -> dict[str, str]:
    """The colours that a shape in a cell has in ``test`` and in ``validation`` scenes and nowhere else."""
    # so many colours behind the preferred one, and one more for each cell in reading order
    start = SHAPES.index(shape) + row * GRID + column
    return {split: tuple(PALETTE)[(start + shift) % len(PALETTE)] for split, shift in (("test", 1), ("validation", 2))}


def split_of(item: SceneObject) -> str:
    """The split that an object's combination of shape, colour and cell belongs to."""
    kept = kept_colours(item.shape, item.row, item.column)
    return next((split for split, colour in kept.items() if colour == item.colour), "train")


def evaluation_questions(
    split: StudySplit, rng: random.Random, per_category: int
) -> Iterator[tuple[int, Scene, str, Question]]:
    """Draws held-out scenes and asks until every category has its questions.

    A question is about an object that belongs to the split, or about the whole scene. A scene is asked one question
    each of some categories, drawn among those that it allows and that lack most. Among a category's questions the
    answer is drawn first, so that "yes" is as frequent as "no".

    Yields:
        Number of the scene, scene, category, question.
    """
    missing = dict.fromkeys(CATEGORIES, per_category)
    number = 0
    while any(missing.values()):
        scene = sample_scene(rng, split, kept_colours)
        kept = {i for i, item in enumerate(scene.objects) if split_of(item) == split}
        pools: dict[str, list[Question]] = {}
        for question in questions(scene, all_pairs()):
            category = _category_of(question)
            if category and missing[category] and (not question.about or kept & set(question.about)):
                pools.setdefault(category, []).append(question)
        chosen = sorted(pools, key=lambda category: (-missing[category], rng.random()))[:QUESTIONS_PER_SCENE]
        for category in chosen:
            answer = rng.choice(sorted({question.answer for question in pools[category]}))
            missing[category] -= 1
            yield number, scene, category, rng.choice([q for q in pools[category] if q.answer == answer])
        number += bool(chosen)


def _category_of(question: Question) -> str | None:
    """A question's category; None for the colour of a named shape that has its preferred colour."""
    if question.trap:
        return "trap"
    by_name = question.category == "colour" and " at the " not in question.text
    return None if by_name else question.category


def questions_of(split: StudySplit) -> str:
    """The dataset of a held-out split's questions."""
    return f"study_{split}"


def captions_of(split: StudySplit) -> str:
    """The dataset of a split's captions."""
    return CAPTIONS if split == "train" else f"study_{split}_captions"


def write_study_data(folder: Path, settings: Settings) -> None:
    """Renders the scenes of all splits and writes everything that is said about them, the same for every seed.

    Args:
        folder: A folder that does not exist yet.
        settings: Amounts.
    """
    (folder / "images").mkdir(parents=True)
    factors: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}

    def draw(split: StudySplit, number: int, scene: Scene) -> str:
        name = f"images/{split}_{number:05d}.png"
        if name not in factors:
            factors[name] = {"split": split, "scene": asdict(scene)}
            render(scene).save(folder / name)
        return name

    def add(dataset: str, image: str, question: str, answer: str) -> None:
        messages = conversation([("\n".join(filter(None, ("<image>", question))), answer)])
        rows.setdefault(dataset, []).append({"messages": messages, "images": [image]})

    rng = random.Random("study train 0")
    texts = []
    for number in range(settings.scenes):
        scene = sample_scene(rng, "train", kept_colours)
        image, text = draw("train", number, scene), caption(scene, rng)
        add(CAPTIONS, image, "", text)
        asked = pick_questions(questions(scene, all_pairs()), rng, settings.asked)
        for question in asked:
            add(TRAIN, image, question.text, question.answer)
        texts += [{"text": text + END_OF_TEXT}, {"text": _read_conversation(text, asked)}]
    key: dict[str, list[dict[str, str]]] = {}
    held_out: tuple[StudySplit, ...] = ("validation", "test")
    for split in held_out:
        rng = random.Random(f"study {split} 0")
        for number, scene, category, question in evaluation_questions(split, rng, settings.questions):
            is_new = f"images/{split}_{number:05d}.png" not in factors
            image = draw(split, number, scene)
            if is_new:
                add(captions_of(split), image, "", caption(scene, rng))
            add(questions_of(split), image, question.text, question.answer)
            entry = {"image": image, "category": category, "question": question.text, "answer": question.answer}
            key.setdefault(questions_of(split), []).append(entry)

    info: dict[str, Any] = {TEXT: {"file_name": f"{TEXT}.json", "columns": {"prompt": "text"}}}
    write_json(folder / f"{TEXT}.json", texts)
    for name, content in rows.items():
        columns = {"messages": "messages", "images": "images"}
        info[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns, "tags": TAGS}
        write_json(folder / f"{name}.json", content)
    write_json(folder / "dataset_info.json", info)
    write_json(folder / "key.json", key)
    write_json(folder / "factors.json", factors)


def _read_conversation(text: str, asked: list[Question]) -> str:
    """Questions and answers about a caption, in the format of the host's template."""
    (first, *rest) = asked
    turns = [(f"{text}\n{first.text}", first.answer), *((question.text, question.answer) for question in rest)]
    return "".join(
        f"{TURN_START}{message['role']}\n{message['content']}{TURN_END}\n" for message in conversation(turns)
    )
