"""``llamafactory-hera doctor RECIPE.yaml``: a line for each check, and problems that name the key and the remedy."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamafactory_hera.cli import main
from tests.e2e.runner import ROOT, write_dataset

RECIPE = str(ROOT / "recipes/demo/hera.yaml")
Doctor = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def doctor(here: Path, capsys: pytest.CaptureFixture) -> Doctor:
    """Runs doctor on the demo's recipe with changes; returns the exit code and the printed lines."""
    return lambda *changes: (main(["doctor", RECIPE, *changes]), capsys.readouterr().out.splitlines())


#: Changes to the recipe -> the start of a line that doctor then prints.
CASES = {
    "hera_memory=auto --processes 2": "ok  batch     32 samples compared at once, neighbors: 10 of 40 candidates",
    "hera_memory=0 per_device_train_batch_size=3": "ok  batch     3 samples compared at once, neighbors: 1 of 2 ",
    "hera_memory=0 neat_packing=true": "ok  batch     16 packed rows compared at once, neighbors: 7 of 15 candidates",
    "dataset=hera_demo_text": "problem: dataset: hera_demo_text has no images",
    "hera_wieght=1": "problem: hera_wieght: no such key; did you mean hera_weight?",
    "stage=sft": "problem: stage: sft trains without HeRA; doctor checks only stage: hera.",
    "hera_memory=0 per_device_train_batch_size=1": "problem: per_device_train_batch_size: 1 gives a global batch of 1",
    "model_name_or_path=hera_demo/language_model": "problem: model_name_or_path: hera_demo/language_model is a text",
    "model_name_or_path=nowhere/vlm": "problem: model_name_or_path: nowhere/vlm is not a folder and cannot be fetched",
    "hera_heads=L99H0": "problem: hera_heads: L99H0 does not exist: the model has layers L0 to L4",
    "template=qwen3_vl": "problem: template: qwen3_vl writes an image as <|image_pad|>; choose one for this model",
    "template=qwen3": "problem: template: qwen3 has no images; choose one for this model: llava_plain",
    "hera_teacher=nowhere/dino": "problem: hera_teacher: nowhere/dino is not a folder and cannot be fetched from",
    "hera_teacher=hera_demo/model": "problem: hera_teacher: hera_demo/model has model_type 'llava'",
    "dataset=nothing": "problem: dataset: nothing is not in hera_demo/data/dataset_info.json",
    "dataset_dir=moved": "problem: media_dir: moved: hera_demo: The image file 'images/",
}


def test_doctor_accepts_the_recipe_of_the_demo(doctor):
    status, printed = doctor()
    assert status == 0
    for expected in (
        "ok  batch     16 samples compared at once, neighbors: 10 of 143 candidates (15 of the batch, 128 remembered)",
        "ok  heads     auto selects 5; llava has 5 layers with up to 8 heads each",
        "ok  template  llava_qwen3 writes an image as <image>",
        "ok  teacher   hera_demo/teacher in hera_demo/teacher",
        "ok  images    opened the first 8 images of hera_demo",
        "ok  memory    estimated: ",
    ):
        assert any(line.startswith(expected) for line in printed), printed


@pytest.mark.parametrize("change", CASES)
def test_doctor_checks_a_recipe(change, doctor, here):
    if change == "dataset_dir=moved":
        (here / "moved").mkdir()
        for file in (here / "hera_demo/data").glob("*.json"):
            shutil.copy(file, here / "moved")
    status, printed = doctor(*change.split())
    found = [line for line in printed if line.startswith(CASES[change])]
    assert found, printed
    assert [line for line in printed if line.startswith("problem")] == found * status


def test_doctor_reads_only_the_start_of_a_large_file(doctor, here, tmp_path):
    row = {"images": [str(next((here / "hera_demo/data/images").iterdir()))], "text": "x" * 300_000}
    write_dataset(tmp_path, [], columns={"images": "images"})
    (tmp_path / "rows.json").write_text("\n".join([json.dumps(row)] * 4))
    status, printed = doctor("dataset=rows", f"dataset_dir={tmp_path}")
    assert (status, "ok  images    opened the first 3 images of rows" in printed) == (0, True), printed


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ("data:image/png;base64," + "A" * 5000, "a row has an image as a data URI"),
        (None, "An image has the type NoneType"),
    ],
)
def test_doctor_names_an_image_that_the_host_cannot_read(image, part, doctor, tmp_path):
    write_dataset(tmp_path, [{"images": [image]}], columns={"images": "images"})
    status, printed = doctor("dataset=rows", f"dataset_dir={tmp_path}")
    assert status == 1
    assert any(line.startswith(f"problem: media_dir: {tmp_path}: rows: {part}") for line in printed), printed
    assert not any("AAA" in line for line in printed)


def test_without_the_patches_every_command_for_a_recipe_names_them(doctor, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hera_patches", None)  # as if it were not installed
    problem = "stage: hera needs llamafactory-hera-patches, which is not installed; run `pip install . ./patches` in"
    status, printed = doctor()
    (line,) = (line for line in printed if line.startswith("problem"))
    assert (status, line.startswith(f"problem: {problem}")) == (1, True), line
    for command in ("select", "score"):
        assert main([command, RECIPE]) == 2
        assert capsys.readouterr().err.startswith(f"llamafactory-hera: {problem}")


def test_without_the_host_doctor_names_it_once(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    status, printed = doctor()
    (line,) = (line for line in printed if line.startswith("problem"))
    assert (status, line.startswith("problem: llamafactory is not installed; run")) == (1, True), line
