"""The study's scenes as files: images, conversations in the host's sharegpt format, and the key to the answers.

In one folder, which is the host's ``dataset_dir``:

- ``study_text``: text alone, for pre-training the language model: the training captions, and conversations in which
  a caption stands in the place of the image, so that the model can answer from what it is told before it sees.
- ``study_captions``: training images with their captions: stage 1, and head selection.
- ``study_train``: training images with one question each, several rows an image: stage 2.
- ``study_validation``, ``study_test``: one question on a held-out image each.
- ``study_validation_captions``, ``study_test_captions``: held-out images with captions, for scoring heads.
- ``key.json``: by held-out dataset and row, the image, category, question and answer.
- ``factors.json``: what each image shows. Nothing trains on these two.
"""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..demo.dataset import conversation, write_json
from ..demo.scene_text import Question, caption
from ..demo.scenes import Scene, render
from ..demo.tokenizer import END_OF_TEXT, TURN_END, TURN_START
from .questions import evaluation_questions, training_questions
from .settings import Settings
from .world import StudySplit, StudyWorld

TRAIN, CAPTIONS, TEXT = "study_train", "study_captions", "study_text"
# The host tells its tokenised training and evaluation data apart by these names alone.
_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def questions_of(split: StudySplit) -> str:
    """The dataset of a held-out split's questions."""
    return f"study_{split}"


def captions_of(split: StudySplit) -> str:
    """The dataset of a split's captions."""
    return CAPTIONS if split == "train" else f"study_{split}_captions"


def write_study_data(folder: Path, settings: Settings, data_seed: int = 0) -> None:
    """Renders the scenes of all splits and writes everything that is said about them.

    Args:
        folder: A folder that does not exist yet.
        settings: Amounts.
        data_seed: The data are the same for every training seed.
    """
    world = StudyWorld()
    (folder / "images").mkdir(parents=True)
    factors: dict[str, Any] = {}
    rows: dict[str, list[dict[str, Any]]] = {}

    def draw(split: StudySplit, number: int, scene: Scene) -> str:
        name = f"images/{split}_{number:05d}.png"
        if name not in factors:
            factors[name] = {"split": split, "scene": asdict(scene)}
            render(world, scene).save(folder / name)
        return name

    def add(dataset: str, image: str, question: str, answer: str) -> None:
        messages = conversation([("\n".join(filter(None, ("<image>", question))), answer)])
        rows.setdefault(dataset, []).append({"messages": messages, "images": [image]})

    rng = random.Random(f"study train {data_seed}")
    texts = []
    for number in range(settings.scenes):
        scene = world.draw(rng, "train")
        image, text = draw("train", number, scene), caption(world, scene, rng)
        add(CAPTIONS, image, "", text)
        asked = training_questions(world, scene, rng, settings.asked)
        for question in asked:
            add(TRAIN, image, question.text, question.answer)
        texts += [{"text": text + END_OF_TEXT}, {"text": _read_conversation(text, asked)}]
    key: dict[str, list[dict[str, str]]] = {}
    for split in ("validation", "test"):
        rng = random.Random(f"study {split} {data_seed}")
        for number, scene, category, question in evaluation_questions(world, split, rng, settings.questions):
            is_new = f"images/{split}_{number:05d}.png" not in factors
            image = draw(split, number, scene)
            if is_new:
                add(captions_of(split), image, "", caption(world, scene, rng))
            add(questions_of(split), image, question.text, question.answer)
            entry = {"image": image, "category": category, "question": question.text, "answer": question.answer}
            key.setdefault(questions_of(split), []).append(entry)

    info: dict[str, Any] = {TEXT: {"file_name": f"{TEXT}.json", "columns": {"prompt": "text"}}}
    write_json(folder / f"{TEXT}.json", texts)
    for name, content in rows.items():
        columns = {"messages": "messages", "images": "images"}
        info[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "columns": columns, "tags": _TAGS}
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
