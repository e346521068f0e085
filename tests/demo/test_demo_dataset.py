import json

import pytest
from PIL import Image

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
        assert entry["tags"] == {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        }
        columns = (
            {"messages": "messages"} if name == "hera_demo_text" else {"messages": "messages", "images": "images"}
        )
        assert entry["columns"] == columns
        assert set(load(demo, entry["file_name"])[0]) == set(columns)


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


def test_factors_cover_every_image_and_question(demo):
    factors = load(demo, "factors.json")
    for file, split in (("demo_train.json", "train"), ("demo_heldout.json", "held_out")):
        for row in load(demo, file):
            entry = factors.pop(row["images"][0])
            assert entry["split"] == split
            pairs = [(m["content"], a["content"]) for m, a in zip(row["messages"], row["messages"][1:], strict=False)]
            for question in entry["questions"]:
                asked = [answer for text, answer in pairs if text.removeprefix("<image>\n") == question["text"]]
                assert asked == [question["answer"]]
    assert not factors
