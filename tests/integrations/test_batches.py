"""`hera_batches: neighbors` in a Trainer: which rows each step compares, alone, on two processes, and resumed."""

import os
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List
from transformers import TrainerCallback

from llamafactory_hera.integrations.transformers import HeraTrainer
from llamafactory_hera.teachers.images import undecoded
from llamafactory_hera.training import Aligner
from llamafactory_hera.training.checks import check_batch, check_settings
from llamafactory_hera.training.collator import CACHED
from tests.e2e.runner import free_port
from tests.integrations.test_trainer_selection import Stream
from tests.integrations.test_transformers import arguments, hera, lines
from tests.ranks import run_ranks
from tests.tiny_models import collate_rows, image_rows, vlm

N_ROWS, TOGETHER = 22, 4  # the last batch of an epoch has two


class Seen:
    """A collator that keeps the numbers of the rows of each micro-batch."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._numbers = {row["input_ids"].data_ptr(): number for number, row in enumerate(rows)}
        self.batches: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        self.batches.append([self._numbers[row["input_ids"].data_ptr()] for row in rows])
        return collate_rows(rows)


def trainer_of(folder: Path, cache: Path, size: int = TOGETHER, **values: Any) -> HeraTrainer:
    model = vlm("llava-llama")
    rows = image_rows(model, N_ROWS)
    for row in rows[::5]:
        row["images"] = []
    rows[3]["images"] = rows[4]["images"]
    keys = {"batches": "neighbors", "teacher_cache": str(cache), **values.pop("hera", {})}
    values = {"per_device_train_batch_size": size, "max_steps": -1, "num_train_epochs": 2, **values}
    settings = arguments(folder, **{"save_only_model": True, **values})
    return HeraTrainer(model, settings, hera=hera(**keys), train_dataset=rows, data_collator=Seen(rows))


def fail(*_: Any) -> None:
    raise AssertionError("a step ran the teacher")


class NoTeacher(TrainerCallback):
    """Lets nobody run the teacher once training has begun."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.aligner.teacher.encoder.encode = fail


def seen_by(folder: Path, cache: Path, resumed: str | None = None, **values: Any) -> tuple[list[list[int]], list]:
    trainer = trainer_of(folder, cache, **values)
    callback = NoTeacher()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer.data_collator.batches, lines(trainer)


def test_each_epoch_is_an_order_of_its_own_and_a_resumed_run_has_the_straight_one_s(tmp_path: Path) -> None:
    keep = {"save_strategy": "steps", "save_steps": 8, "save_only_model": False}
    straight, logged = seen_by(tmp_path / "run", tmp_path / "cache", **keep)
    first, second = straight[:6], straight[6:]
    for epoch in (first, second):
        assert [len(batch) for batch in epoch] == [4] * 5 + [2]
        assert sorted(chain(*epoch)) == list(range(N_ROWS))
        assert all(sum(row % 5 == 0 for row in batch) <= 1 for batch in epoch)  # those without an image
    assert first != second
    assert seen_by(tmp_path / "again", tmp_path / "cache", **keep) == (straight, logged)  # now from the cache
    assert seen_by(tmp_path / "other", tmp_path / "cache", data_seed=7)[0] != straight
    resumed = seen_by(tmp_path / "run", tmp_path / "cache", str(tmp_path / "run/checkpoint-8"), **keep)
    assert resumed == (straight[8:], logged)


def test_under_gradient_caching_a_slice_is_what_the_step_compares(tmp_path: Path) -> None:
    parts = {"gradient_accumulation_steps": 2, "size": TOGETHER}
    gradcache = parts | {"hera": {"accumulate": "gradcache"}}
    whole, cached, apart = (
        list(chain(*seen_by(tmp_path / "run", tmp_path / "cache", **values)[0]))
        for values in ({"size": 2 * TOGETHER}, gradcache, parts)
    )
    assert cached == whole != apart


def _train_on_a_rank(rank: int) -> list:
    folder = Path(os.environ["BATCHES_TEST_FOLDER"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    values = {"size": TOGETHER // 2, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}
    values |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": True}
    straight, _ = seen_by(folder / "two", folder / "cache", **values)
    resumed, _ = seen_by(folder / "two", folder / "cache", str(folder / "two/checkpoint-4"), **values)
    return [straight, resumed]


@pytest.mark.slow
def test_two_processes_compare_what_one_compares_and_resume_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHES_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    one, _ = seen_by(tmp_path / "one", tmp_path / "of_one", gradient_accumulation_steps=2)
    (tmp_path / "ranks").mkdir()
    (first, resumed), (second, also_resumed) = run_ranks(_train_on_a_rank, 2, tmp_path / "ranks")
    for number, batch in enumerate(one):
        last = number % 6 == 5  # which accelerate fills up from the front
        assert first[number] + ([] if last else second[number]) == batch
    assert (resumed, also_resumed) == (first[8:], second[8:])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            "^train_sampling_strategy: group_by_length orders the",
        ),
        ({"train_sampling_strategy": "sequential"}, "^train_sampling_strategy: sequential .*hera_batches: random"),
    ],
)
def test_another_order_is_refused(tmp_path: Path, values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path / "run", tmp_path / "cache", **values)
    trainer_of(tmp_path / "run", tmp_path / "cache", hera={"batches": "random"}, **values)


@pytest.mark.parametrize("key", ["disable_shuffling", "streaming", "group_by_length", "curriculum_sampling"])
def test_a_host_s_switch_is_refused(key: str) -> None:
    asked, size = hera(batches="neighbors", teacher_cache="cache"), SimpleNamespace(per_device_train_batch_size=4)
    check_batch(asked, size, SimpleNamespace(**{key: False}), None)
    check_batch(hera(), size, SimpleNamespace(**{key: True}))
    with pytest.raises(ValueError, match=f"^{key}: True orders .* set {key}: false, or hera_batches: random"):
        check_batch(asked, size, None, SimpleNamespace(**{key: True}))


def test_what_would_make_no_groups_is_refused(tmp_path: Path) -> None:
    small, asked = SimpleNamespace(per_device_train_batch_size=2), hera(batches="neighbors", teacher_cache="cache")
    check_batch(hera(memory=8), small)
    with pytest.raises(ValueError, match=r"^per_device_train_batch_size: 2 gives .* neighbors makes groups"):
        check_batch(replace(asked, memory=8), small)
    rows = image_rows(vlm("llava-llama"), 4)
    aligner = Aligner(vlm("llava-llama"), replace(asked, teacher_cache=str(tmp_path)))
    with pytest.raises(ValueError, match=r"^batch_size: 2 is too small for groups"):
        aligner.sampler(rows, 2)
    batch = {"input_ids": torch.zeros(1, 4), "hera_source": torch.tensor([CACHED])}
    with pytest.raises(ValueError, match=r"^hera_batches: neighbors is an order .* sampler=aligner.sampler"):
        aligner.begin(batch)  # a loop of its own without that order


def test_a_stream_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", tmp_path / "cache")
    trainer.train_dataset = Stream([])
    with pytest.raises(ValueError, match=r"^train_dataset: a stream has an order of its own"):
        check_settings(trainer.aligner.config, trainer)


def test_features_that_are_gone_are_named(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", tmp_path / "cache")
    loader = trainer.get_train_dataloader()
    for file in trainer.aligner.teacher.cache.folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"^hera_teacher_cache: .* lacks the features of 17 images"):
        next(iter(loader))


def test_images_inside_of_a_dataset_are_found_as_the_collator_finds_them(tmp_path: Path) -> None:
    """Those of the library `datasets`, which are encoded bytes in its rows."""
    rows = [{"images": row["images"]} for row in image_rows(vlm("llava-llama"), 8)]
    data = Dataset.from_list(rows, features=Features({"images": List(Image())}))
    aligner = Aligner(vlm("llava-llama"), hera(batches="neighbors", teacher_cache=str(tmp_path)))
    stored, decode = undecoded(data)
    assert sorted(aligner.sampler(stored, 4)) == list(range(8))
    collate = aligner.collator(lambda rows: {"input_ids": torch.zeros(len(rows), 1)}, decode=decode)
    assert set(collate([stored[row] for row in range(8)])["hera_source"].tolist()) == {CACHED}
