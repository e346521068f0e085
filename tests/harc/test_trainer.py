"""HARC in transformers' Trainer and TRL: its data, its gradients, its exact resumption, and its refusals."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor

from llamafactory_harc.config import HarcConfig
from llamafactory_harc.trainer import HarcTrainer

from . import tiny


def lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def adapted(folder: Path, **values: Any) -> HarcTrainer:
    return tiny.trainer_of(folder, tiny.with_lora(tiny.chat_model(), random=True), **values)


def test_a_run_resumes_exactly_over_epochs_and_refreshes_and_leaves_a_plain_adapter(tmp_path):
    keys = {"refresh": 2, "late_from": 3, "n_layers": 1, "late_layers": 2}
    straight = tiny.trainer_of(tmp_path / "run", harc=keys, save_strategy="steps", save_steps=4)
    straight.train()
    logged = lines(straight)
    assert logged[-1]["epoch"] > 2
    for line in logged:
        total = line["lm_loss"] + line["harc_coupling"] + line["harc_response"] + 10 * line["harc_kl"]
        assert line["loss"] == pytest.approx(total, abs=1e-3)
    assert len(straight.coupler.layers) == 2

    resumed = tiny.trainer_of(tmp_path / "run", harc=keys)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert lines(resumed) == logged
    plain = PeftModel.from_pretrained(tiny.chat_model(), tmp_path / "run/checkpoint-6").eval()
    ids = torch.tensor([tiny.encoded()[0]["input_ids"]])
    with torch.no_grad():
        for trainer in (straight, resumed):
            assert torch.equal(plain(ids).logits, trainer.model.eval()(ids).logits)

    other = tiny.trainer_of(tmp_path / "run", harc=keys | {"margin": 0.3})
    with pytest.raises(ValueError, match=r"harc_margin was 0.5, is 0.3"):
        other.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))


def gradients(trainer: HarcTrainer, batches: list[Any]) -> dict[str, Tensor]:
    """Returns the gradients of one optimizer step over these micro-batches, without changing the weights."""
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    inputs = [trainer._collate(rows) for rows in batches]
    count = trainer._get_num_items_in_batch(inputs, torch.device("cpu"))
    for batch in inputs:
        trainer.training_step(trainer.model, batch, count)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def mixture(trainer: HarcTrainer, count: int = 1) -> list[list[Any]]:
    rows = [trainer._rows[index] for index in trainer._mixture]
    return [rows[6 * number : 6 * number + 6] for number in range(count)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, reentrant):
    plain, trainer = adapted(tmp_path), adapted(tmp_path)
    trainer.model.enable_input_require_grads()
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, expected = (gradients(each, mixture(each)) for each in (trainer, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_accumulated_micro_batches_count_the_labels_of_harmful_rows_alone(tmp_path):
    trainer = adapted(tmp_path, harc={"layers": "L4,L5"})
    batches = mixture(trainer, 2)
    batches[1] = [row._replace(kind="harmless") if row is batches[1][0] else row for row in batches[1]]
    counts = [sum(len(row.ids) - row.n_prompt for row in batch if row.kind == "harmful") for batch in batches]
    trainer.coupler.config = HarcConfig(layers="L4,L5", coupling_weight=0, response_weight=0, kl_weight=0)
    first, second = (gradients(trainer, [batch]) for batch in batches)  # each is a mean over its labels
    mean = {name: (counts[0] * first[name] + counts[1] * second[name]) / sum(counts) for name in first}
    assert counts[0] > counts[1]
    torch.testing.assert_close(gradients(trainer, batches), mean, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_of_benign_rows_alone_has_finite_gradients(tmp_path):
    trainer = adapted(tmp_path)
    found = gradients(trainer, [[row for row in trainer._rows if row.kind != "harmful"][:3]])
    assert all(value.isfinite().all() and value.any() for value in found.values())


def test_training_moves_the_cosines_of_a_tiny_chat_model_but_hardly_its_predictions_on_harmless_text(tmp_path):
    model = tiny.chat_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    answers = [row._replace(kind="harmful") for rows in tiny.rows(HarcConfig())[1].values() for row in rows]  # labeled
    batch = {key: value for key, value in tiny.collator()(answers).items() if not key.startswith("harc_")}
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    text = torch.tensor([row["input_ids"] for row in tiny.encoded() if row["kind"] == "harmless"][:1])
    with torch.no_grad():
        before = model(text).logits.log_softmax(-1)
    trainer = tiny.trainer_of(tmp_path, tiny.with_lora(model), {"margin": 0.8}, max_steps=60, learning_rate=1e-2)
    trainer.train()
    first, last = lines(trainer)[0], lines(trainer)[-1]
    for place in ("prompt", "response"):
        assert first[f"harc_cos_harmful_{place}"] < 0.6 < 0.8 < last[f"harc_cos_harmful_{place}"]
        assert last[f"harc_cos_benign_{place}"] < 0
    with torch.no_grad():
        after = trainer.model.eval()(text).logits.log_softmax(-1)
    assert float((before.exp() * (before - after)).sum(-1).mean()) < 0.05


def test_a_fused_loss_is_refused(tmp_path):
    trainer = tiny.trainer_of(tmp_path)
    trainer.coupler._logits.install = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the model returned no logits"):
        gradients(trainer, mixture(trainer))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": tiny.chat_model()}, "model: HARC compares it with and without its LoRA adapter"),
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size: 4 is not a multiple of 6"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size: True does not work with HARC"),
        ({"harc": {"layers": "L4,L99"}}, "harc_layers: L99 does not exist; the model ends with L9"),
        ({"harc": {"layers": "L0"}}, "harc_layers: L0 is the embeddings"),
    ],
)
def test_unsuitable_settings_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer_of(tmp_path, **values)


def test_fused_packed_and_sharded_trainers_are_refused_by_name(tmp_path):
    trainer = tiny.trainer_of(tmp_path)
    for key in ("use_liger_kernel", "packing", "padding_free"):
        trainer.args = SimpleNamespace(**vars(tiny.trainer_of(tmp_path).args) | {key: True})
        with pytest.raises(ValueError, match=f"{key}: True does not work with HARC"):
            trainer._check()
    trainer.args, trainer.is_fsdp_enabled = tiny.trainer_of(tmp_path).args, True
    with pytest.raises(ValueError, match="fsdp: HARC's pass without the adapter"):
        trainer._check()


def test_with_qlora_the_base_is_the_quantized_model(tmp_path):
    tiny.chat_model(width=64).save_pretrained(tmp_path / "model")
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = tf.LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings, dtype=torch.float32)
    trainer = tiny.trainer_of(tmp_path / "run", tiny.with_lora(model), max_steps=2)
    trainer.train()
    first, second = lines(trainer)
    assert first["harc_kl"] == pytest.approx(0, abs=1e-6)  # the adapter has no effect yet
    assert second["harc_kl"] > 1e-6


def test_trl_trains_as_the_plain_trainer(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from llamafactory_harc.trl import HarcSFTTrainer

    settings = {"per_device_train_batch_size": 6, "max_steps": 2, "logging_steps": 1, "learning_rate": 3e-3}
    args = trl.SFTConfig(str(tmp_path), **settings, report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    data, model = datasets.Dataset.from_list(tiny.encoded()), tiny.with_lora(tiny.chat_model())
    trainer = HarcSFTTrainer(model, args, harc=HarcConfig(), train_dataset=data, processing_class=tiny.tokenizer())
    plain = tiny.trainer_of(tmp_path, max_steps=2)
    if hasattr(importlib.import_module("trl.trainer.utils"), "FusedCausalLMOutput"):  # TRL 1.16 always fuses the loss
        with pytest.raises(ValueError, match="the model returned no logits"):
            trainer.train()
        return
    trainer.train()
    plain.train()
    for ours, theirs in zip(lines(trainer), lines(plain), strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-3)
