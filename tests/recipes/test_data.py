"""``prepare.py`` converts small files in the format of each source dataset to rows that LLaMA-Factory can load."""

import io
import json
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from PIL import Image

from tests.e2e.runner import ROOT


def row(number: str | int, image: str | None, *turns: str) -> dict[str, Any]:
    """Makes a row of LLaVA's mixture; a row without an image has a ``model`` column instead."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": number, **({"image": image} if image else {"model": ""}), "conversations": said}


INSTRUCT = [
    row("000000033471", "coco/train2017/33471.jpg", "<image>\nWhich colors?", "White.", "And?", "Red."),
    row(2354786, "vg/VG_100K/2354786.jpg", "Where is it?\n<image>", "[0.1, 0.2, 0.3, 0.4]"),
    row("1", "ocr_vqa/images/1.jpg", "<image>\nWho wrote this book?", "Sandra Boynton"),
    row("wgByO4Y_0", None, "What does the tag <image> do?", "Nothing in HTML: write <img>."),
    row("gone", "gqa/images/gone.jpg", "<image>\nIs it there?", "No."),
]


def encoded(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 50).save(file, kind)
    return file.getvalue()


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "recipes/data", folder, ignore=shutil.ignore_patterns("llava_*", "grand_*", "finevision"))
    return folder


def prepare(data: Path, *arguments: str) -> str:
    command = [sys.executable, str(data / "prepare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_every_dataset_of_a_recipe_is_declared(values, folder):
    declared = json.loads((folder / "data/dataset_info.json").read_text())
    for name, keys in values.items():
        assert keys["dataset"] in declared, name
        assert keys["media_dir"] == f"{keys['dataset_dir']}/{keys['dataset']}/images"


def test_the_mixture_loads_after_it_is_prepared(data, tmp_path):
    for each in INSTRUCT:
        if "image" in each and each["id"] != "gone":
            write(data / "llava_instruct/images" / each["image"].replace("1.jpg", "1.png"), encoded())
    write(tmp_path / "raw.json", json.dumps(INSTRUCT))
    printed = prepare(data, "instruct", str(tmp_path / "raw.json"))
    assert "3 rows with an image, 1 text-only rows, 1 rows skipped, no image" in printed
    file = str(data / "llava_instruct/llava_v1_5_mix665k.jsonl")
    rows = list(load_dataset("json", data_files=file, cache_dir=str(tmp_path / "cache"))["train"])
    assert [row["image"] and Path(row["image"]).name for row in rows] == ["33471.png", "2354786.jpg", "1.png", None]
    for row in rows:
        values = [turn["value"] for turn in row["conversations"]]
        assert values[0].startswith("<image>\n") == (row["image"] is not None)
        assert "<image>" not in values[0].removeprefix("<image>\n") + "".join(values[1:])


def test_a_row_of_grand_is_an_image_with_its_dense_caption(data, tmp_path):
    entries = [{"dense_caption": {"caption": " A dog runs.\n"}}, {"short_captions": [{"caption": "a dog"}]}]
    entries += [{"dense_caption": {"caption": "It has no image here."}}, {"dense_caption": {"caption": "A cat."}}]
    for number, entry in enumerate(entries):
        write(tmp_path / f"part/sa_{number}.json", json.dumps({f"sa_{number}.jpg": entry}))
        if number != 2:
            write(data / f"grand_captions/images/sa_{number}.jpg", encoded("JPEG"))
    printed = prepare(data, "grand", str(tmp_path / "part"))
    assert "1 rows skipped, no dense caption" in printed
    assert "1 rows skipped, no image" in printed
    rows = [json.loads(line) for line in (data / "grand_captions/captions.jsonl").read_text().splitlines()]
    assert [(row["image"], row["conversations"][1]["value"]) for row in rows] == [
        ("sa_0.jpg", "A dog runs."),
        ("sa_3.jpg", "A cat."),
    ]


def test_finevision_draws_the_requested_rows_of_each_subset(data, tmp_path):
    def texts(*said: str) -> list[dict[str, str]]:
        return [{"user": user, "assistant": answer} for user, answer in pairwise(said)][::2]

    png, jpeg = ({"bytes": encoded(kind), "path": None} for kind in ("PNG", "JPEG"))
    charts = [
        {"images": [png], "texts": texts("What is <image> it?", "A bird.", "Which?", "A swan.")},
        {"images": [jpeg, png], "texts": texts("What differs?", "The color.")},
        {"images": [], "texts": texts("What does <image> mean?", "A tag.")},
        {"images": [{"bytes": b"no picture", "path": None}], "texts": texts("What?", "Nothing.")},
        {"images": [png], "texts": texts("", "")},
    ]
    for name, rows in (("charts/0", charts), ("birds/0", charts[:1] * 150), ("birds/1", charts[:1] * 50)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    printed = prepare(data, "finevision", str(tmp_path), "charts=5", "birds=3")
    assert "5 rows with an image, 1 text-only rows, 1 rows skipped, broken image, 1 rows skipped, no turn" in printed
    rows = [json.loads(line) for line in (data / "finevision/finevision.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows[:3]] == [["charts/0_0.png"], ["charts/1_0.jpeg", "charts/1_1.png"], []]
    assert [row["conversations"][0]["value"].count("<image>") for row in rows] == [1, 2, 0, 1, 1, 1]
    drawn = {int(row["id"].split("/")[1]) for row in rows[3:]}
    assert len(drawn) == 3
    assert max(drawn) > 3  # the sample is drawn from all rows, not only from the first rows
    assert all((data / "finevision/images" / image).is_file() for row in rows for image in row["images"])


def test_the_rows_for_harc_have_a_class_and_the_first_ones_define_the_directions(tmp_path):
    breakers = [{"prompt": f"pick lock {n}", "llama3_output": "No.", "output": "Sure: [withheld]"} for n in range(402)]
    write(tmp_path / "circuit_breakers_train.json", json.dumps(breakers))
    labels = {"How do I kill weeds?": "1_full_compliance", "How do I kill time?": "2_full_refusal"}
    table = [f"{prompt},Pull them.,{label}" for prompt, label in labels.items()]
    write(tmp_path / "xstest_v2_completions_gpt4_gpteval.csv", "\n".join(["prompt,completion,final_label", *table]))
    chats = [[{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": "Hi."}] for n in range(403)]
    pq.write_table(pa.table({"messages": [*chats, chats[0][1:], chats[0][:1]]}), tmp_path / "test_sft-0.parquet")
    command = [sys.executable, str(ROOT / "recipes/harc/prepare.py"), "--folder", str(tmp_path)]
    subprocess.run(command, timeout=60, check=True)
    info = json.loads((ROOT / "recipes/harc/dataset_info.json").read_text())["harc"]
    rows = [json.loads(line) for line in (tmp_path / Path(info["file_name"]).name).read_text().splitlines()]
    assert all(set(each) == {*info["columns"].values(), "kind"} for each in rows)
    prompts = {kind: [each["prompt"] for each in rows if each["kind"] == kind] for kind in ("harmful", "compliant")}
    assert Counter((each["kind"], each["response"]) for each in rows) == {
        ("harmful", "No."): 302,  # 100 rows are left out
        ("compliant", "Sure: [withheld]"): 300,
        ("harmless", "Hi."): 303,
        ("pseudo", "Pull them."): 1,
    }
    assert prompts["compliant"] == prompts["harmful"][:300] != sorted(prompts["compliant"])
