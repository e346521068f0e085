"""HARC in transformers' Trainer and TRL: what it trains on, that it resumes exactly, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments

from llamafactory_harc.config import HarcConfig
from llamafactory_harc.trainer import HarcTrainer

from . import tiny


def lines(trainer: Any) -> list[dict[str, float]]:
    history = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if "runtime" not in name} for line in history]


def adapter(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_run_resumes_exactly_over_epochs_and_refreshes_and_leaves_a_plain_adapter(tmp_path: Path) -> None:
    keys = {"refresh": 2, "late_from": 3, "n_layers": 1, "late_layers": 2}
    straight = tiny.trainer_of(tmp_path / "run", harc=keys, save_strategy="steps", save_steps=4)
    straight.train()
    logged = lines(straight)
    assert [line["epoch"] for line in logged][-1] > 2  # an epoch has two steps
    assert {"lm_loss", "harc_coupling", "harc_response", "harc_kl", "harc_cos_benign_response"} <= set(logged[0])
    for line in logged:
        total = line["lm_loss"] + line["harc_coupling"] + line["harc_response"] + 10 * line["harc_kl"]
        assert line["loss"] == pytest.approx(total, abs=1e-3)
    assert len(straight.coupler.layers) == 2

    resumed = tiny.trainer_of(tmp_path / "run", harc=keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert lines(resumed) == logged
    after = adapter(straight)
    assert all(torch.equal(value, after[name]) for name, value in adapter(resumed).items())
    plain = PeftModel.from_pretrained(tiny.chat_model(), tmp_path / "run/checkpoint-6").eval()
    ids = torch.tensor([tiny.encoded(1)[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, straight.model.eval()(ids).logits)

    other = tiny.trainer_of(tmp_path / "run", harc=keys | {"margin": 0.3})
    with pytest.raises(ValueError, match=r"harc_margin was 0.5, is 0.3"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))


def gradients(trainer: HarcTrainer, batches: list[Any]) -> dict[str, Tensor]:
    """Returns the gradients of one optimizer step over these micro-batches, and leaves the weights."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    inputs = [trainer._collate(rows) for rows in batches]
    count = trainer._get_num_items_in_batch(inputs, torch.device("cpu"))
    for batch in inputs:
        trainer.training_step(trainer.model, batch, count)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def mixture(trainer: HarcTrainer, count: int = 1) -> list[list[Any]]:
    order = list(trainer._mixture)[: 6 * count]
    return [[trainer._rows[i] for i in order[start : start + 6]] for start in range(0, len(order), 6)]


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], rel: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= rel * value.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, reentrant: bool) -> None:
    plain = tiny.trainer_of(tmp_path, tiny.with_lora(tiny.chat_model(), random=True))
    expected = gradients(plain, mixture(plain))
    model = tiny.with_lora(tiny.chat_model(), random=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    trainer = tiny.trainer_of(tmp_path, model)
    assert_equal(gradients(trainer, mixture(trainer)), expected)


def test_accumulated_micro_batches_count_the_labels_of_harmful_rows_alone(tmp_path: Path) -> None:
    trainer = tiny.trainer_of(tmp_path, tiny.with_lora(tiny.chat_model(), random=True), harc={"layers": "4,5"})
    batches = mixture(trainer, 2)
    found = gradients(trainer, batches)
    singles = [gradients(trainer, [batch]) for batch in batches]  # with means over each one's labels
    counts = [sum(len(row.ids) - row.n_prompt for row in batch if row.kind == "harmful") for batch in batches]
    assert counts[0] == counts[1]  # all refusals of the tiny data are equal
    assert_equal(found, {name: (singles[0][name] + singles[1][name]) / 2 for name in found})


def test_a_micro_batch_of_benign_rows_alone_has_finite_gradients(tmp_path: Path) -> None:
    trainer = tiny.trainer_of(tmp_path, tiny.with_lora(tiny.chat_model(), random=True))
    benign = [row for row in trainer._rows if row.kind != "harmful"][:3]
    found = gradients(trainer, [benign])
    assert all(value.isfinite().all() for value in found.values())
    assert any(value.any() for value in found.values())


def test_an_evaluation_batch_has_no_term(tmp_path: Path) -> None:
    trainer = tiny.trainer_of(tmp_path, max_steps=1)
    ids = torch.tensor([tiny.encoded(1)[0]["input_ids"]])
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    assert torch.equal(loss, trainer.model(input_ids=ids, labels=ids).loss)


def test_the_coupling_moves_in_a_tiny_instruct_model_and_general_text_does_not(tmp_path: Path) -> None:
    model = tiny.instruct_model()
    text = torch.tensor([row["input_ids"] for row in tiny.encoded() if row["kind"] == "harmless"][:1])
    with torch.no_grad():
        before = model(text).logits.log_softmax(-1)
    trainer = tiny.trainer_of(tmp_path, tiny.with_lora(model), {"margin": 0.8}, max_steps=60, learning_rate=1e-2)
    trainer.train()
    first, last = lines(trainer)[0], lines(trainer)[-1]
    assert first["harc_cos_harmful_prompt"] < 0.6 < 0.8 < last["harc_cos_harmful_prompt"]
    assert first["harc_cos_harmful_response"] < 0.6 < 0.8 < last["harc_cos_harmful_response"]
    assert max(last["harc_cos_benign_prompt"], last["harc_cos_benign_response"]) < 0.05
    with torch.no_grad():
        after = trainer.model.eval()(text).logits.log_softmax(-1)
    assert float((before.exp() * (before - after)).sum(-1).mean()) < 0.05


def test_a_fused_loss_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer_of(tmp_path)
    inner = trainer.model.base_model.model
    original = inner.forward
    inner.forward = lambda *args, **kwargs: _no_logits(original(*args, **kwargs))
    with pytest.raises(ValueError, match="the model returned no logits"):
        gradients(trainer, mixture(trainer))


def _no_logits(output: Any) -> Any:
    if torch.is_grad_enabled():
        output.logits = None
    return output


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": tiny.chat_model}, "model: HARC compares it with itself without its adapter"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 4"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: True does not work with HARC"),
        ({"harc": {"layers": "4,99"}}, "harc_layers: 99 does not exist: the model has 9 blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    values = {key: value() if callable(value) else value for key, value in values.items()}
    with pytest.raises(ValueError, match=message):
        tiny.trainer_of(tmp_path, **values)


def test_liger_and_packing_are_refused_by_name(tmp_path: Path) -> None:
    trainer = tiny.trainer_of(tmp_path)
    for key in ("use_liger_kernel", "packing", "padding_free", "fsdp"):
        trainer.args = SimpleNamespace(**{**vars(TrainingArguments(str(tmp_path), use_cpu=True)), key: True})
        with pytest.raises(ValueError, match=f"{key}: True does not work with HARC"):
            trainer._check()


def test_trl_trains_tokenized_rows(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from llamafactory_harc.trl import HarcSFTTrainer

    settings = {"per_device_train_batch_size": 6, "max_steps": 2, "logging_steps": 1, "learning_rate": 3e-3}
    args = trl.SFTConfig(str(tmp_path), **settings, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    data, model = datasets.Dataset.from_list(tiny.encoded()), tiny.with_lora(tiny.chat_model())
    trainer = HarcSFTTrainer(model, args, harc=HarcConfig(), train_dataset=data, processing_class=tiny.tokenizer())
    trainer.train()
    plain = tiny.trainer_of(tmp_path, max_steps=2)
    plain.train()
    for ours, theirs in zip(lines(trainer), lines(plain), strict=True):
        assert {name: ours[name] for name in theirs if name != "grad_norm"} == pytest.approx(
            {name: theirs[name] for name in theirs if name != "grad_norm"}, rel=1e-4
        )
