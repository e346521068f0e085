"""Settings, data and models that make HeRA wrong or ineffective are refused before the first step."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import DeepSpeedPlugin
from datasets import Dataset
from torch import nn

from llamafactory_hera.integrations.trainer_rows import N_SEARCHED, check_rows
from llamafactory_hera.integrations.transformers import HeraTrainer
from llamafactory_hera.teachers.images import sample_images
from llamafactory_hera.training import checks
from llamafactory_hera.training.checks import check_settings
from tests.integrations.test_trainer_selection import Stream
from tests.integrations.test_transformers import BATCH, hera, trainer_of
from tests.ranks import holder
from tests.tiny_models import IMAGE, collate_rows, image_rows, same, snapshot, vlm


def make(folder: Path, rows: list[dict], model: nn.Module | None = None, **given: Any) -> HeraTrainer:
    values = {"max_steps": 1, "hera": given.pop("hera", {}), **given.pop("arguments", {})}
    return trainer_of(folder, model, rows, given=given, **values)


ROWS = image_rows(vlm("llava-llama"), 2 * BATCH)
NO_IMAGES = [{name: value for name, value in row.items() if name != "images"} for row in ROWS]
RAW = [{"messages": [], "images": row["images"]} for row in ROWS]
PHOTOS = {"rows": [{**row, "photo": row["images"]} for row in ROWS], "images_of": lambda row: row["photo"]}


def test_a_second_run_into_one_folder_is_refused_until_the_first_one_ends(tmp_path):
    trainer = make(tmp_path, ROWS[:BATCH])
    with holder(tmp_path), pytest.raises(ValueError, match=r"^output_dir: .* is in use by another"):
        trainer.train()
    trainer.train()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": NO_IMAGES}, r"^images_of: no image was found in the 8 rows .* \(input_ids,"),
        ({"images_of": lambda row: row["images"][0]}, r"^images_of returned Image; return a list of images"),
        ({"rows": RAW}, "^remove_unused_columns: True drops the columns messages, images .* set it to False"),
        (PHOTOS, "^remove_unused_columns: True drops the columns images, photo .* the images in them; set it to"),
        ({"arguments": {"per_device_train_batch_size": 1}}, "^per_device_train_batch_size: 1 gives a global batch"),
        ({"hera": {"heads": "auto"}, "train_dataset": None}, "^heads: auto selects on the training data"),
    ],
)
def test_the_constructor_refuses_unsuitable_data_and_settings(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **{"rows": ROWS, **given})


def _deepspeed(keys: dict[str, Any]) -> DeepSpeedPlugin:
    return DeepSpeedPlugin(
        hf_ds_config={"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}, **keys}
    )


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_one_image_among_many_rows_is_enough(kind):
    rows = [{"images": [], "text": "a"} for _ in range(2 * N_SEARCHED)]
    rows[-1] = {"images": ["a.png"], "text": "a"}
    trainer = SimpleNamespace(train_dataset=kind(rows), args=SimpleNamespace(remove_unused_columns=False))
    check_rows(trainer, sample_images)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_n_gpu", 2, r"^n_gpu: 2 devices in one process .*torchrun"),
        ("parallelism_config", SimpleNamespace(cp_size=2), "^parallelism_config: cp_size=2 splits .*; use data paral"),
        (
            "deepspeed_plugin",
            _deepspeed({"sequence_parallel_size": 2}),
            "^deepspeed: sequence_parallel_size=2 splits ",
        ),
        ("deepspeed_plugin", _deepspeed({"tensor_parallel": {"autotp_size": 2}}), "^deepspeed: autotp_size=2 splits "),
        ("_tp_size", 2, "^from_pretrained: tp_size=2 splits .*; use data parallelism"),
        ("distributed_config", SimpleNamespace(tp_size=2), "^distributed_config: tp_size=2 splits .*; use data paral"),
        ("_mixed_precision", "fp8", "^mixed_precision: fp8 does not work with HeRA, .*; use bf16"),
        ("model_init", vlm, "^model_init: "),
        ("hf_device_map", {"a": 0, "b": "cpu"}, "^device_map: HeRA needs the model on one device, not 0, cpu; "),
        ("dispatch_batches", True, "^accelerator_config: .*; set accelerator_config: {dispatch_batches: false}"),
        ("train_dataset", Stream([]), "^accelerator_config: .*; set accelerator_config: {dispatch_batches: false}"),
    ],
)
def test_settings_that_hera_does_not_support_are_refused(tmp_path, name, value, message, monkeypatch):
    trainer = make(tmp_path, ROWS[:BATCH])
    model, state = trainer.model, trainer.accelerator.state
    owners = {"hf_device_map": model, "_tp_size": model, "distributed_config": model.config, "_mixed_precision": state}
    owners["dispatch_batches"] = trainer.accelerator.dataloader_config
    monkeypatch.setattr(
        owners.get(name, trainer if hasattr(trainer, name) else trainer.args), name, value, raising=False
    )
    monkeypatch.setattr(checks, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=message):
        check_settings(hera(), trainer)


def test_a_process_that_imported_unsloth_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(ValueError, match=r"^unsloth: importing it replaces the attention .* do not import unsloth"):
        make(tmp_path, ROWS[:BATCH])


# -- the first batch -------------------------------------------------------------------------------------------------


def without_image_tokens(rows: list[dict]) -> dict[str, Any]:
    batch = without_pixels(rows)
    return batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5)}


def without_pixels(rows: list[dict]) -> dict[str, Any]:
    batch = collate_rows(rows)
    batch.pop("pixel_values")
    return batch


def labels_on_all_text(rows: list[dict]) -> dict[str, Any]:
    batch = collate_rows(rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        (without_image_tokens, "^data_collator: 4 samples .* contain no image token"),
        (without_pixels, "^data_collator: 4 samples .* contains no pixel_values"),
        (labels_on_all_text, "^pooling='answer' .* all text is labeled.*or set pooling='text'"),
    ],
)
def test_the_first_batch_is_checked_before_a_step(tmp_path, collate, message):
    model = vlm("llava-llama")
    before = snapshot(model)
    trainer = make(tmp_path, image_rows(model, BATCH), model, data_collator=collate)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(model.state_dict(), before)


def captions_only(rows: list[dict]) -> dict[str, Any]:
    """Makes a batch as in LLaVA's stage 1: an image, then its caption, and nothing before them."""
    batch = labels_on_all_text(rows)
    return {name: values if name == "pixel_values" else values[:, 1:] for name, values in batch.items()}


@pytest.mark.parametrize(("collate", "pooling"), [(labels_on_all_text, "text"), (captions_only, "answer")])
def test_labels_on_all_text_train_if_there_is_no_prompt(tmp_path, collate, pooling):
    model = vlm("llava-llama")
    trainer = make(tmp_path, image_rows(model, BATCH), model, data_collator=collate, hera={"pooling": pooling})
    trainer.train()
    assert trainer.state.log_history[0]["hera_loss"] > 0
