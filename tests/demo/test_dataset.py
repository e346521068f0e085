import json
import random
import sys
from itertools import product

import pytest
from PIL import Image

from llamafactory_hera.demo.dataset import DIGIT_SIDE, PHOTO_SIDE, REGIONS, Amounts, digits, make_samples, photographs

DATASETS = {
    "hera_demo": "demo_train.json",
    "hera_demo_heldout": "demo_heldout.json",
    "hera_demo_captions": "demo_captions.json",
    "hera_demo_text": "demo_text.json",
}


def load(demo, file: str):
    return json.loads((demo["data"] / file).read_text())


def test_dataset_info_names_files_and_columns_as_the_host_reads_them(demo):
    info = load(demo, "dataset_info.json")
    assert {name: entry["file_name"] for name, entry in info.items()} == DATASETS
    for name, entry in info.items():
        assert entry["formatting"] == "sharegpt"
        tags = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
        assert entry["tags"] == {f"{name}_tag": value for name, value in tags.items()}
        columns = ["messages"] if name == "hera_demo_text" else ["messages", "images"]
        assert entry["columns"] == {column: column for column in columns}
        assert list(load(demo, entry["file_name"])[0]) == columns


@pytest.mark.parametrize("file", DATASETS.values())
def test_conversations_alternate_and_name_one_image_each(demo, file):
    for row in load(demo, file):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        placeholders = [message["content"].count("<image>") for message in row["messages"]]
        assert all(message["content"] for message in row["messages"])
        if "images" in row:
            assert len(row["images"]) == placeholders[0] == sum(placeholders) == 1
            with Image.open(demo["data"] / row["images"][0]) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")
        else:
            assert sum(placeholders) == 0


def test_splits_share_no_image(demo):
    def pixels(file: str) -> set[bytes]:
        return {Image.open(demo["data"] / row["images"][0]).tobytes() for row in load(demo, file)}

    train, held_out = pixels("demo_train.json"), pixels("demo_heldout.json")
    assert not train & held_out
    assert pixels("demo_captions.json") == train


def test_held_out_answers_cannot_be_copied_from_the_caption(demo):
    captions = {row["images"][0]: row["messages"][1]["content"] for row in load(demo, "demo_captions.json")}
    places = [
        [message["content"] for message in row["messages"]].index(captions[row["images"][0]])
        for row in load(demo, "demo_train.json")
    ]
    first, last = sum(place == 1 for place in places), sum(place > 1 for place in places)
    assert min(first, last) > len(places) / 4  # training has both orders
    for row in load(demo, "demo_heldout.json"):
        assert row["messages"][-1]["content"].endswith(".")  # a caption is a sentence
        assert not any(message["content"].endswith(".") for message in row["messages"][1:-2:2])


def test_held_out_regions_share_no_pixel_with_training_regions():
    train = [region for region in REGIONS if region.split == "train"]
    held_out = [region for region in REGIONS if region.split == "held_out"]
    assert len(held_out) >= 5
    for a, b in product(train, held_out):
        apart = a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]
        assert a.source != b.source or apart


def test_photographs_show_every_region_in_turn():
    regions = [region for region in REGIONS if region.split == "train"]
    made = photographs(len(regions) + 1, random.Random(0), "train")
    assert [item.questions[0].answer for item in made] == [region.subject for region in [*regions, regions[0]]]
    assert {item.image.size for item in made} == {(PHOTO_SIDE, PHOTO_SIDE)}
    assert {item.image.mode for item in made} == {"RGB"}
    assert made[0].image.tobytes() != made[-1].image.tobytes()  # another crop of the same region


def test_digits_of_the_splits_are_different_samples_with_their_own_label():
    from sklearn.datasets import load_digits

    made = digits(60, 30, random.Random(0))
    pixels = {split: {item.image.tobytes() for item in items} for split, items in made.items()}
    assert [len(items) for items in made.values()] == [60, 30]
    assert not pixels["train"] & pixels["held_out"]
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    targets = load_digits().target[random.Random(0).sample(range(1797), 90)]
    assert [item.questions[0].answer for item in made["train"]] == [words[target] for target in targets[:60]]
    assert made["train"][0].image.size == (DIGIT_SIDE, DIGIT_SIDE)


def test_yes_no_questions_about_real_images_are_answered_by_what_they_show():
    items = photographs(60, random.Random(1), "train") + digits(60, 0, random.Random(1))["train"]
    answers = []
    for item in items:
        text, answer = item.questions[1].text, item.questions[1].answer
        named = text.removesuffix("?").removeprefix("Is this a picture of ").removeprefix("Is this the digit ")
        assert (answer == "yes") == (named == item.questions[0].answer)
        answers.append(answer)
    assert 40 < answers.count("yes") < 80


@pytest.mark.parametrize("package", ["skimage", "sklearn"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "llamafactory-hera\[demo\]"'):
        make_samples(Amounts(1, 0, 0), Amounts(0, 0, 0), seed=0)


def test_the_questions_are_those_of_held_out_conversations(demo):
    asked = load(demo, "demo_questions.json")
    told = [
        (row["images"][0], question["content"].removeprefix("<image>\n"), answer["content"])
        for row in load(demo, "demo_heldout.json")
        for question, answer in list(zip(row["messages"][::2], row["messages"][1::2], strict=True))[:-1]  # no caption
    ]
    assert [(row["image"], row["question"], row["answer"]) for row in asked] == told
    assert len({row["id"] for row in asked}) == len(asked)
    assert {row["category"] for row in asked if "_scene_" not in row["source"]} == {"digit", "photograph"}
