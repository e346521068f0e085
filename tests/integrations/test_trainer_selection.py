"""``auto`` in a plain Trainer uses the Trainer's rows, collator and model, and checks a file before reusing it."""

import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.transformers import HeraTrainer
from tests.integrations.test_transformers import arguments, hera, lines
from tests.tiny_models import collate_rows, image_rows, same, snapshot, vlm

SELECT = {"heads": "auto", "select_k": 4, "select_samples": 24, "select_m": 2, "select_batch_size": 8}


def config(**keys: Any) -> HeraConfig:
    keys = {f"hera_{key}": value for key, value in {**SELECT, **keys}.items()}
    return HeraConfig.from_keys(hera().keys() | keys)


def selecting(
    folder: Path, model: nn.Module | None = None, rows: Any = None, collate: Any = collate_rows, **keys: Any
) -> HeraTrainer:
    model = vlm("llava-llama") if model is None else model
    rows = image_rows(model, 24) if rows is None else rows
    settings = arguments(folder, max_steps=2, resume_from_checkpoint=keys.pop("checkpoint", None))
    return HeraTrainer(model, settings, hera=config(**keys), train_dataset=rows, data_collator=collate)


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hera/heads.json").read_text())


@pytest.mark.parametrize("mode", ["llm", "mllm"])
def test_heads_are_selected_before_training_and_nothing_else_changes(tmp_path, mode):
    model = vlm("llava-llama")
    model.model.vision_tower.eval()  # a part of the model that the run does not train
    before = snapshot(model)
    modes = [module.training for module in model.modules()]
    trainer = selecting(tmp_path / "auto", model, select_mode=mode)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert [module.training for module in model.modules()] == modes
    assert same(model.state_dict(), before)

    found = written(tmp_path / "auto")
    assert found["heads"] == list(trainer.aligner.targets.names)
    assert found["provenance"]["keys"]["hera_select_mode"] == mode
    scores = torch.tensor(found["provenance"]["scores"])
    worst = scores.flatten().argsort(stable=True)[:2].tolist()
    assert found["heads"] == [f"L{place // 4}H{place % 4}" for place in worst]

    named = selecting(tmp_path / "named", heads=",".join(found["heads"]))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    trainer.train()
    named.train()
    assert lines(trainer) == lines(named)


def test_a_rerun_reuses_the_selection_and_a_file_of_another_run_is_refused(tmp_path, caplog):
    first = selecting(tmp_path / "run")
    caplog.clear()
    again = selecting(tmp_path / "run")
    assert "selected with the same settings" in caplog.text
    assert again.aligner.targets == first.aligner.targets

    scores = written(tmp_path / "run")["provenance"]["scores"]
    first.aligner.save(tmp_path / "run/checkpoint-1")
    selecting(tmp_path / "run", rows=image_rows(vlm("llava-llama"), 25))  # other data
    assert written(tmp_path / "run")["provenance"]["scores"] != scores
    resumed = selecting(tmp_path / "run", checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert resumed.aligner.targets == first.aligner.targets
    with pytest.raises(ValueError, match=r"were selected for another run: select_m was 2, is 3"):
        selecting(tmp_path / "run", checkpoint=str(tmp_path / "run/checkpoint-1"), select_m=3)
    shutil.copytree(tmp_path / "run/checkpoint-1/hera", tmp_path / "run/hera", dirs_exist_ok=True)

    file = str(tmp_path / "run/hera/heads.json")
    selecting(tmp_path / "other", heads=file)
    with pytest.raises(ValueError, match=r"^heads: the heads .* were selected for another run: model was"):
        selecting(tmp_path / "other", vlm("llava-llama", seed=1), heads=file)
    selecting(tmp_path / "other", vlm("llava-llama", seed=1), heads=file, heads_force=True)
    assert "Continuing, because heads_force is set" in caplog.text


class Stream(IterableDataset):
    """A stream of rows that knows its length."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def test_a_stream_that_knows_its_length_is_read_in_order(tmp_path):
    model = vlm("llava-llama")
    trainer = selecting(tmp_path, model, Stream(image_rows(model, 24)))
    trainer.train()
    assert lines(trainer)[0]["hera_loss"] > 0


def test_reading_a_file_of_heads_draws_no_random_numbers(tmp_path):
    def collate(rows: list[dict]) -> dict[str, Any]:
        np.random.rand(), random.random(), torch.rand(1)  # like a collator that crops or masks at random
        return collate_rows(rows)

    model = vlm("llava-llama")
    selecting(tmp_path / "run", model)
    states = []
    for heads in (",".join(written(tmp_path / "run")["heads"]), str(tmp_path / "run/hera/heads.json")):
        selecting(tmp_path / "new", model, collate=collate, heads=heads)
        states.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
    assert states[0] == states[1]


def flatten(rows: list[dict], mask: bool) -> dict[str, Any]:
    """Joins rows as the ``data_flatten`` of QwenLM's scripts does, or as padding-free collators do."""
    joined = {name: torch.cat([row[name] for row in rows], 1) for name in ("input_ids", "labels")}
    ends = torch.tensor([0, *(row["input_ids"].numel() for row in rows)]).cumsum(0)
    return joined | ({"attention_mask": ends} if mask else {})


@pytest.mark.parametrize("mask, words", [(True, "its attention_mask has the shape"), (False, "it makes 1 rows")])
def test_a_collator_that_joins_samples_is_refused_before_training(tmp_path, mask, words):
    with pytest.raises(ValueError, match=f"^data_collator: {words}"):
        selecting(tmp_path, collate=partial(flatten, mask=mask), select_mode="mllm")


def test_a_dataset_of_llama_factory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^select_dataset: grand_captions works in LLaMA-Factory only"):
        selecting(tmp_path, select_dataset="grand_captions")


def test_layers_are_selected_too(tmp_path):
    trainer = selecting(tmp_path, heads=None, granularity="layer", layers="auto", select_m=1)
    assert trainer.aligner.targets.granularity == "layer"
    assert (tmp_path / "hera/layers.json").is_file()
