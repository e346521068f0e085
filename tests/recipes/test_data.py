"""The datasets of the recipes, loaded by the host from small files of their formats."""

import io
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers as tf
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from llamafactory_hera.backbones.build import build_backbone

from ..backbones.tiny import save_language_model, save_tower
from .conftest import ROOT


def row(number: str | int, image: str | None, *turns: str) -> dict[str, Any]:
    """A row of LLaVA's files: one with a picture, or one of text with the column that the mixture has there."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": number, **({"image": image} if image else {"model": ""}), "conversations": said}


PRETRAIN = [
    row(
        "004539375",
        "00453/004539375.jpg",
        "Render a clear and concise summary of the photo.\n<image>",
        "select luxury furniture 3 - inch gel memory foam mattress topper",
    ),
    row("002239345", "00223/002239345.jpg", "<image>\nWhat is this?", "a gray watch with an army style strap"),
]
INSTRUCT = [
    row(
        "000000033471",
        "coco/train2017/000000033471.jpg",
        "<image>\nWhat are the colors of the bus in the image?",
        "The bus in the image is white and red.",
        "What feature can be seen on the back of the bus?",
        "The back of the bus features an advertisement.",
    ),
    row(2354786, "vg/VG_100K/2354786.jpg", "Where is it?\n<image>", "[0.1, 0.2, 0.3, 0.4]"),
    row("1", "ocr_vqa/images/1.jpg", "<image>\nWho wrote this book?", "Sandra Boynton"),
    row("wgByO4Y_0", None, "What does the tag <image> do?", "Nothing in HTML: write <img>."),
    row("gone", "gqa/images/gone.jpg", "<image>\nIs it there?", "No."),
]


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB").save(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    llm, tower = save_language_model("qwen2_5", root / "llm"), save_tower("siglip", root / "tower")
    return build_backbone(str(llm), str(tower), root / "built").folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of ``recipes/data`` with the two LLaVA files in it, and the pictures but one."""
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "recipes/data", folder, ignore=shutil.ignore_patterns("llava_*", "grand_*", "finevision"))
    files = {"llava_pretrain/blip_laion_cc_sbu_558k.json": PRETRAIN, "llava_instruct/raw.json": INSTRUCT}
    for name, rows in files.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(rows))
        for row in rows:
            if "image" in row and row["id"] != "gone":
                picture(folder / name.split("/")[0] / "images" / row["image"])
    images = folder / "llava_instruct/images/ocr_vqa/images"
    (images / "1.jpg").rename(images / "1.png")
    return folder


def loaded(model: Path, data: Path, dataset: str, template: str) -> list[dict[str, Any]]:
    """The samples as a recipe's run would prepare them, with this project's checks around the host's loader."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from llamafactory_hera.integrations.llamafactory.checks import checked_dataset
    from llamafactory_hera.objectives import find

    keys = {
        "model_name_or_path": str(model),
        "stage": "hera",
        "do_train": True,
        "hera_heads": "L0H0",
        "dataset_dir": str(data),
        "dataset": dataset,
        "media_dir": str(data / dataset / "images"),
        "template": template,
        "cutoff_len": 512,
        "output_dir": str(data / "out"),
        "overwrite_cache": True,
        "cache_dir": str(data / "cache"),
        "use_cpu": True,
    }
    model_args, data_args, training_args, _, _ = get_train_args(keys)
    module = load_tokenizer(model_args)
    shape = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    checked = checked_dataset(get_dataset, find("feature_pooled"))
    prepared = checked(shape, model_args, data_args, training_args, stage="sft", **module)
    return list(prepared["train_dataset"])


def answers(model: Path, sample: dict[str, Any]) -> str:
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    return tokenizer.decode([label for label in sample["labels"] if label != -100])


def prepare(data: Path, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, str(data / "prepare.py"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_dataset_of_a_recipe_is_declared(values: dict, folder: Path) -> None:
    declared = json.loads((folder / "data/dataset_info.json").read_text())
    for name, keys in values.items():
        assert keys["dataset"] in declared, name
        assert keys["media_dir"] == f"{keys['dataset_dir']}/{keys['dataset']}/images"


def test_captions_load_with_their_one_picture_and_a_missing_one_is_named(model: Path, data: Path) -> None:
    samples = loaded(model, data, "llava_pretrain", "llava_plain")
    assert len(samples) == 2
    for sample, row in zip(samples, PRETRAIN, strict=True):
        assert sample["images"] == [str(data / "llava_pretrain/images" / row["image"])]
        assert answers(model, sample) == row["conversations"][1]["value"] + "\n"
        assert len(sample["input_ids"]) == 16 + sum(label != -100 for label in sample["labels"])
    (data / "llava_pretrain/images/00223/002239345.jpg").unlink()
    with pytest.raises(ValueError, match=r"sample 1 of llava_pretrain .*002239345\.jpg"):
        loaded(model, data, "llava_pretrain", "llava_plain")


def test_the_raw_mixture_cannot_be_loaded_and_the_prepared_one_can(model: Path, data: Path) -> None:
    raw = "".join(json.dumps(row) + "\n" for row in INSTRUCT)
    (data / "llava_instruct/llava_v1_5_mix665k.jsonl").write_text(raw)
    with pytest.raises(DatasetGenerationError) as caught:
        loaded(model, data, "llava_instruct", "llava_qwen2_5")
    assert "id" in str(caught.value.__cause__)
    printed = prepare(data, "instruct", str(data / "llava_instruct/raw.json"))
    assert "3 rows with a picture, 1 text-only rows, 1 rows left out, no picture" in printed
    samples = loaded(model, data, "llava_instruct", "llava_qwen2_5")
    names = [[Path(image).name for image in sample["images"] or []] for sample in samples]
    assert names == [["000000033471.jpg"], ["2354786.jpg"], ["1.png"], []]
    image = tf.AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<image>")
    assert [sample["input_ids"].count(image) for sample in samples] == [16, 16, 16, 0]
    assert answers(model, samples[0]).count("<|im_end|>") == 2
    assert answers(model, samples[3]).startswith("Nothing in HTML")


def test_dense_captions_load(model: Path, data: Path) -> None:
    annotations = data / "grand_captions/annotations/part"
    annotations.mkdir(parents=True)
    caption = "A dog runs over the grass while two people sit on a bench."
    for number, entry in {
        1: {"objects": [], "dense_caption": {"caption": f" {caption}\n", "details": []}},
        2: {"objects": [], "short_captions": [{"caption": "a dog", "details": []}]},
        3: {"objects": [], "dense_caption": {"caption": "It has no picture here.", "details": []}},
        4: {"objects": [], "dense_caption": {"caption": "A cat sleeps.", "details": []}},
    }.items():
        (annotations / f"sa_{number}.json").write_text(json.dumps({f"sa_{number}.jpg": entry}))
    for number in (1, 2, 4):
        picture(data / f"grand_captions/images/sa_{number}.jpg")
    printed = prepare(data, "grand", str(annotations))
    assert "1 rows left out, no dense caption" in printed
    assert "1 rows left out, no picture" in printed
    samples = loaded(model, data, "grand_captions", "llava_plain")
    assert [answers(model, sample) for sample in samples] == [caption + "\n", "A cat sleeps.\n"]


def test_finevision_loads_from_parquet_with_as_many_rows_of_a_subset_as_asked(model: Path, data: Path) -> None:
    def encoded(kind: str) -> dict[str, Any]:
        file = io.BytesIO()
        Image.effect_noise((40, 30), 50).save(file, kind)
        return {"bytes": file.getvalue(), "path": None}

    def said(*texts: str) -> list[dict[str, str]]:
        return [{"user": user, "assistant": answer} for user, answer in pairwise(texts)][::2]

    rows = [
        {"images": [encoded("PNG")], "texts": said("What is <image> it?", "A bird.", "Which?", "A swan.")},
        {"images": [encoded("JPEG"), encoded("PNG")], "texts": said("What differs?", "The color.")},
        {"images": [], "texts": said("What does <image> mean?", "A tag.")},
        {"images": [{"bytes": b"no picture", "path": None}], "texts": said("What?", "Nothing.")},
        {"images": [encoded("PNG")], "texts": said("", "")},
    ]
    source = data / "finevision/parquet"
    for subset, held in (("charts", rows), ("birds", rows[:1] * 200)):
        for part in range(0, len(held), 150):
            (source / subset).mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(held[part : part + 150]), source / subset / f"train-{part:05}.parquet")
    printed = prepare(data, "finevision", str(source), "charts=5", "birds=3")
    assert "5 rows with a picture, 1 text-only rows, 1 rows left out, broken picture, 1 rows left out, no" in printed
    samples = loaded(model, data, "finevision", "llava_qwen2_5")
    held = [sample["images"] or [] for sample in samples]
    names = [[Path(image).relative_to(data / "finevision/images").as_posix() for image in images] for images in held]
    assert names[:3] == [["charts/0_0.png"], ["charts/1_0.jpeg", "charts/1_1.png"], []]
    drawn = [int(name.split("/")[1].split("_")[0]) for (name,) in names[3:]]
    assert len(set(drawn)) == 3
    assert max(drawn) > 3  # from the whole subset, not from its beginning
    image = tf.AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<image>")
    assert [sample["input_ids"].count(image) for sample in samples] == [16, 32, 0, 16, 16, 16]
    assert answers(model, samples[0]) == "A bird.<|im_end|>\nA swan.<|im_end|>\n"
