"""HeRA in a plain transformers Trainer: it trains, resumes, writes its files, and weights its term correctly."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.model_card import add_scores
from llamafactory_hera.integrations.transformers import HeraTrainer, HeraTrainerMixin
from llamafactory_hera.selection.report import compare
from llamafactory_hera.teachers.images import image_key
from llamafactory_hera.training import Aligner
from tests.integrations.gradients import check_term, run, token_mean
from tests.selection.tiny import write_scores
from tests.tiny_models import collate_rows, image_files, image_rows, same, student_processor, teacher_folder, vlm

BATCH = 4
VIRAL = {"heads": None, "granularity": "layer", "layers": "L1", "objective": "viral"}


def hera(**keys: object) -> HeraConfig:
    given: dict[str, Any] = {"heads": "L1H0,L0H2", "teacher": teacher_folder(), "k": 2, "weight": 1.0, "memory": 0}
    return HeraConfig(**given | keys)


def arguments(folder: Path, **values: object) -> TrainingArguments:
    shared = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "max_steps": 6}
    shared |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**shared, "learning_rate": 3e-3, "save_only_model": False, **values})


def trainer_of(folder: Path, model: nn.Module | None = None, rows: Any = None, **values: Any) -> HeraTrainer:
    """Makes a Trainer; ``hera`` has HeRA's keys, ``given`` the Trainer's arguments, and ``values`` its settings."""
    model = vlm("llava-llama") if model is None else model
    given = {"hera": hera(**values.pop("hera", {})), "data_collator": collate_rows, **values.pop("given", {})}
    given.setdefault("train_dataset", image_rows(model, 3 * BATCH) if rows is None else rows)
    return HeraTrainer(model, arguments(folder, **values), **given)


def lines(trainer: Trainer) -> list[dict[str, float]]:
    """Returns the training log lines without timings."""
    return [
        {name: value for name, value in line.items() if "runtime" not in name and "per_second" not in name}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def lora() -> nn.Module:
    return get_peft_model(vlm("llava-llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))


@pytest.mark.parametrize("keys", [{}, VIRAL | {"objective": "contrastive"}], ids=["heads", "layers"])
def test_a_compiled_run_logs_the_values_of_a_plain_run(tmp_path, keys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the Trainer overwrites it for the whole process
    shared: dict[str, Any] = {"hera": keys, "max_steps": 3, "gradient_checkpointing": True}
    plain = trainer_of(tmp_path / "plain", **shared)
    plain.train()
    compiled = trainer_of(tmp_path / "compiled", **shared, torch_compile=True, torch_compile_backend="eager")
    compiled.train()
    assert compiled.aligner.watch.gradient_checked
    for found, expected in zip(lines(compiled), lines(plain), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [lambda: vlm("llava-llama"), lora], ids=["full", "LoRA"])
def test_a_run_logs_its_curves_resumes_exactly_and_leaves_its_files(tmp_path, make, caplog):
    memory = {"hera": {"memory": 6}}
    straight = trainer_of(tmp_path / "run", make(), save_strategy="steps", save_steps=3, **memory)
    straight.train()
    logged = lines(straight)
    assert len(logged) == 6
    comparable = {"hera_loss", "hera_mknn", "hera_mknn_chance"}  # once the memory is full
    assert [comparable & set(line) for line in logged] == [set()] * 2 + [comparable] * 4
    assert all({"loss", "lm_loss", "hera_temperature"} <= set(line) for line in logged)
    for line in logged[2:]:
        assert line["loss"] == pytest.approx(line["lm_loss"] + line["hera_loss"], abs=1e-4)
    if make is not lora:  # the second factor of LoRA starts at 0
        assert logged[-1]["lm_loss"] < logged[2]["lm_loss"]
    for folder in ("checkpoint-3/hera", "hera"):
        assert {"state.safetensors", "heads.json", "run.json"} <= {
            p.name for p in (tmp_path / "run" / folder).iterdir()
        }

    resumed = trainer_of(tmp_path / "run", make(), **memory)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert lines(resumed) == logged
    total, term = logged[2]["lm_loss"] + logged[2]["hera_loss"], logged[2]["hera_loss"]
    (share,) = (text for text in caplog.messages if text.startswith("HeRA | the term is"))  # once, in the first run
    assert share == f"HeRA | the term is {term / total:.1%} of the loss (1 x {term:.3g} of {total:.3g})"
    (first, again) = (text for text in caplog.messages if "MKNN of the aligned heads went" in text)
    assert first == again  # the resumed run knows the lines before it
    assert "the last 2 of 4 log lines" in first
    assert same(straight.model.state_dict(), resumed.model.state_dict())


def test_the_card_shows_scores_before_and_after_and_claims_no_result(tmp_path):
    folder = tmp_path / "run"
    before = write_scores(folder / "hera/heads.json", [[0.9, 0.9, 0.1], [0.3, 0.9, 0.9]])
    trainer = trainer_of(folder, given={"targets": Targets.parse("L1H0,L0H2")})
    trainer.hub_datasets = ["owner/images"]
    trainer.create_model_card(finetuned_from=str(tmp_path))
    page = (folder / "README.md").read_text()
    assert "| MKNN with the teacher | before |\n|---|--:|\n| L1H0 | 0.3000 |\n| L0H2 | 0.1000 |" in page
    after = write_scores(folder / "hera/scores.json", [[0.9, 0.9, 0.4], [0.5, 0.9, 0.9]])
    add_scores(folder, compare([before, after], ["before", "after"], aligned="L1H0,L0H2"))
    page = (folder / "README.md").read_text()
    assert "| L1H0 | 0.3000 | 0.5000 |\n| L0H2 | 0.1000 | 0.4000 |\n| mean | 0.2000 | 0.4500 |" in page
    assert page.count("| MKNN with the teacher |") == 1
    metadata = ModelCard(page).data
    assert metadata.datasets == ["owner/images"]
    assert not metadata.eval_results  # the model before training is not this model
    assert metadata.base_model is None  # a local folder names no model of the hub


@pytest.mark.parametrize("save_steps", [2, 4])
def test_the_best_model_is_loaded_with_its_hera_state_and_the_card_says_so(tmp_path, save_steps):
    settings: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    # The largest loss is the best one here, so that the best step is not the last.
    settings |= {"eval_steps": 2, "save_steps": save_steps, "metric_for_best_model": "loss", "greater_is_better": True}
    model = vlm("llava-llama")
    settings["given"] = {"eval_dataset": image_rows(model, 3 * BATCH)}
    trainer = trainer_of(tmp_path, model, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.create_model_card()
    loaded = "The weights are from the best step, 2." in (tmp_path / "README.md").read_text()
    assert loaded == (save_steps == 2)  # otherwise, that step was not saved
    if not loaded:
        return
    kept = trainer_of(tmp_path, type(model).from_pretrained(tmp_path / "checkpoint-2"), **settings)
    kept.aligner.load(tmp_path / "checkpoint-2")
    assert same(kept.model.state_dict(), trainer.model.state_dict())
    values = trainer.aligner.objective.values()
    assert values == kept.aligner.objective.values() != Aligner(model, hera()).objective.values()
    assert values["hera_temperature"] != lines(trainer)[-1]["hera_temperature"]


def test_a_run_logs_its_setup(tmp_path, caplog):
    caplog.set_level(logging.INFO, "llamafactory_hera")
    trainer_of(tmp_path, max_steps=1).train()
    for part in (
        "heads: L1H0,L0H2 (llama, tested)",
        "objective: contrastive, weight 1.0",
        "global batch: 4 (1 processes x 4 x 1 accumulation steps)",
        "neighbors: 1 of 3 candidates (3 of the batch, 0 remembered); k=2 needs 4 candidates",
    ):
        assert part in caplog.text


def test_a_batch_of_one_needs_no_key_but_the_teacher(tmp_path):
    gradients = []
    for weight in (0.0, 0.01):
        given = {"hera": HeraConfig(teacher=teacher_folder(), weight=weight), "data_collator": collate_rows}
        model, steps = vlm("llava-llama"), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        trainer = HeraTrainer(model, arguments(tmp_path, **steps), train_dataset=image_rows(model, 48), **given)
        gradients.append(run(trainer)[0])
    assert trainer.aligner.memory.size == 40
    assert [{"hera_loss", "hera_mknn"} <= line.keys() for line in lines(trainer)] == [False] * 5 + [True]
    without, trained = (torch.cat([g[name].flatten() for name in g if "layers.0" in name]) for g in gradients)
    assert (trained - without).norm() > 1e-3 * without.norm()


def test_after_an_interruption_the_model_can_be_used_and_trained_again(tmp_path):
    model = vlm("llava-llama")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path, model, max_steps=1).train()
    hook.remove()
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()
    trainer_of(tmp_path, model, max_steps=1).train()  # its folder is no longer locked


def test_evaluation_uses_neither_the_term_nor_the_images(tmp_path):
    trainer = trainer_of(tmp_path, eval_steps=2, max_steps=2)
    trainer.args.eval_strategy, trainer.eval_dataset = "steps", image_rows(trainer.model, BATCH)
    trainer.train()
    (during,) = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    plain = Trainer(trainer.model, arguments(tmp_path), eval_dataset=trainer.eval_dataset, data_collator=collate_rows)
    assert during == trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("column", ["images", "picture"])
def test_the_mixin_adds_hera_to_a_custom_trainer_whose_collator_sees_no_images(tmp_path, column):
    seen = []

    class Custom(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            seen.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class CustomHera(HeraTrainerMixin, Custom):
        pass

    def collate(rows: list[dict]) -> dict[str, Tensor]:
        tensors = [{name: value for name, value in row.items() if isinstance(value, Tensor)} for row in rows]
        assert column == "picture" or tensors == rows  # the Trainer drops its unused columns
        return collate_rows(tensors)

    model = vlm("llava-llama")
    rows = [{**row, column: row["images"]} for row in image_rows(model, BATCH)]
    settings = arguments(tmp_path, max_steps=1, remove_unused_columns=column == "images")
    data: dict[str, Any] = {"train_dataset": rows, "data_collator": collate, "images_of": lambda row: row[column]}
    trainer = CustomHera(model, settings, hera=hera(), **data)
    trainer.train()
    assert lines(trainer)[0]["hera_loss"] > 0
    assert seen == [{"input_ids", "attention_mask", "labels", "pixel_values"}]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_dataset_are_cached_by_their_files_and_the_collator_sees_them_decoded(tmp_path, workers):
    datasets = pytest.importorskip("datasets")
    model = vlm("llava-llama")
    rows, paths = image_rows(model, 2 * BATCH), image_files(tmp_path, 2 * BATCH, (9, 9))
    for row in rows:
        del row["images"]
    stored = datasets.Dataset.from_list([{"row": n, "image": path} for n, path in enumerate(paths)])
    stored = stored.cast_column("image", datasets.Image())

    def collate(given: list[dict]) -> dict[str, Tensor]:
        assert all(isinstance(row["image"], Image.Image) for row in given)
        return collate_rows([rows[row["row"]] for row in given])

    settings = {"max_steps": 4, "remove_unused_columns": False, "dataloader_num_workers": workers}
    settings |= {"hera": {"teacher_cache": str(tmp_path / "cache")}, "given": {"data_collator": collate}}
    trainer = trainer_of(tmp_path / "run", model, stored, **settings)
    trainer.train()
    assert trainer.train_dataset is stored
    cache = trainer.aligner.teacher.cache
    assert len(cache) == len(paths)
    assert all(feature is not None for feature in cache.get([image_key(path) for path in paths]))


def test_a_trainer_whose_step_bypasses_the_term_is_stopped(tmp_path):
    class Bypasses(Trainer):
        def training_step(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Tensor:
            loss = model(**{name: value for name, value in inputs.items() if not name.startswith("hera_")}).loss
            loss.backward()
            return loss.detach()

    class Middle(Bypasses):
        pass

    class BypassesHera(HeraTrainerMixin, Middle):
        pass

    model = vlm("llava-llama")
    rows = image_rows(model, BATCH)
    trainer = BypassesHera(model, arguments(tmp_path), hera=hera(), train_dataset=rows, data_collator=collate_rows)
    with pytest.raises(RuntimeError, match=r"Bypasses.training_step does not call compute_loss"):
        trainer.train()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("keys", [{}, {"accumulate": "gradcache"}, VIRAL], ids=["heads", "gradcache", "tokens"])
def test_steps_with_a_non_finite_term_train_only_on_the_lm_loss(tmp_path, monkeypatch, keys, side):
    settings = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2, "max_steps": 3}
    rows = image_rows(vlm("llava-llama"), 3 * BATCH)
    processing = {"processing_class": SimpleNamespace(image_processor=student_processor())}
    trainer = trainer_of(tmp_path, rows=rows, hera={"max_nan": 9, **keys}, given=processing, **settings)
    source = trainer.aligner.capture if side == "student" else trainer.aligner.teacher
    name = "representations" if side == "student" else "features"
    original = getattr(source, name)
    monkeypatch.setattr(source, name, lambda *args: original(*args).index_fill(0, torch.tensor([0]), math.nan))
    before = trainer.aligner.optimizer.state()
    trainer.train()
    rounds = 1 if "accumulate" in keys else 2
    assert [line["hera_nan_batches"] for line in lines(trainer)] == [rounds, 1, rounds]  # an epoch has three batches
    after = trainer.aligner.optimizer.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain = vlm("llava-llama")
    rows = [{k: v for k, v in row.items() if k != "images"} for row in rows]
    sft = Trainer(plain, arguments(tmp_path, **settings), train_dataset=rows, data_collator=collate_rows)
    sft.train()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


# -- gradient accumulation -------------------------------------------------------------------------------------------

STEPS = 2


def test_gradient_caching_restarts_after_a_failed_attempt(tmp_path):
    two = {"gradient_accumulation_steps": STEPS, "hera": {"accumulate": "gradcache"}, "max_steps": 2}
    trainer, errors = trainer_of(tmp_path, **two), [RuntimeError("CUDA out of memory.")]

    class FailOnce(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            while errors:
                raise errors.pop()

    trainer.add_callback(FailOnce())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.model.zero_grad()
    trainer.train()
    straight = trainer_of(tmp_path, **two)
    straight.train()
    assert lines(trainer) == lines(straight)


def no_loss_kwargs() -> nn.Module:
    model = vlm("llava-llama")
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.parametrize("accumulate", ["none", "gradcache"])
@pytest.mark.parametrize(
    ("make", "loss_function", "accepts"),
    [
        (lambda: vlm("llava-llama"), None, True),
        (no_loss_kwargs, None, False),
        (lambda: vlm("qwen2_5_vl"), None, False),
        (lambda: vlm("llava-llama"), token_mean, True),
        (no_loss_kwargs, token_mean, False),
    ],
    ids=["LLaVA", "LLaVA without kwargs", "Qwen2.5-VL", "LLaVA, own loss", "LLaVA without kwargs, own loss"],
)
def test_the_term_is_the_mean_over_micro_batches_for_every_kind_of_lm_loss(
    tmp_path, make, loss_function, accepts, accumulate
):
    rows = image_rows(make(), STEPS * BATCH)
    values = {"max_steps": 1, "gradient_accumulation_steps": STEPS, "max_grad_norm": 0.0}
    values |= {"train_sampling_strategy": "sequential", "given": {"compute_loss_func": loss_function}}

    def trainer_with(weight: float) -> HeraTrainer:
        return trainer_of(tmp_path, make(), rows, hera={"weight": weight, "accumulate": accumulate}, **values)

    assert trainer_with(0.5).model_accepts_loss_kwargs == accepts
    model, losses = make(), []  # each micro-batch's loss, summed over its labeled tokens, and their number
    for start in range(0, len(rows), BATCH):
        batch = collate_rows([{k: v for k, v in row.items() if k != "images"} for row in rows[start : start + BATCH]])
        n = int((batch["labels"][:, 1:] != -100).sum())
        losses.append((model(**batch).loss.item() * n, n))
    logged = check_term(trainer_with, accumulate == "gradcache", 2e-6)
    by_tokens = sum(total for total, _ in losses) / sum(n for _, n in losses)
    by_batches = sum(total / n for total, n in losses) / STEPS
    assert abs(by_tokens - by_batches) > 4e-4
    counts = accepts or loss_function is not None
    assert logged["lm_loss"] == pytest.approx(by_tokens if counts else by_batches, abs=1e-4)


@pytest.mark.parametrize(("library", "accumulate"), [("DeepSpeed", "none"), ("torch", "none"), ("torch", "gradcache")])
def test_the_loss_scale_is_removed_from_the_objectives_gradients(tmp_path, library, accumulate):
    # Uses only the loss scaler, because DeepSpeed's engine and the Trainer refuse fp16 on most CPUs.
    scaler: Any = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=1)
    if library == "DeepSpeed":
        module = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
        scaler = module.DynamicLossScaler(2.0**10, 1, 1.0, 1, False)  # it grows after each step

    def temperatures(scaled: bool) -> list[float]:
        keys = {"objective_lr": 0.1, "accumulate": accumulate}
        steps = 2 if accumulate == "gradcache" else 1
        trainer = trainer_of(tmp_path / str(scaled), hera=keys, max_grad_norm=0, gradient_accumulation_steps=steps)

        def backward(loss: Tensor, **_: object) -> None:
            scaler.backward(loss)
            for parameter in filter(lambda p: p.grad is not None, trainer.model.parameters()):
                parameter.grad /= scaler.loss_scale
            scaler.update_scale(overflow=False)

        if scaled and library == "torch":  # accelerate's optimizer divides the gradients of the model
            trainer.accelerator.scaler = scaler
        elif scaled:
            engine = SimpleNamespace(optimizer=scaler)
            vars(trainer.accelerator).update(
                backward=backward, deepspeed_engine_wrapped=SimpleNamespace(engine=engine), free_memory=lambda *_: None
            )
        trainer.train()
        return [line["hera_temperature"] for line in lines(trainer)]

    assert temperatures(scaled=True) == pytest.approx(temperatures(scaled=False), rel=1e-5)
