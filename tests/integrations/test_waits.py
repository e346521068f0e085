"""In the steady state the host never waits for the device because of the alignment."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.transformers import HeraTrainer
from llamafactory_hera.training import Aligner, aligner
from tests.tiny_models import autoencoder_folder, collate_rows, image_rows, student_processor, teacher_folder, vlm
from tests.training.test_tokens import SmallRoss
from tests.waits import Waits

STEPS, FIRST, BATCH = 6, 3, 4
LAYER = {"heads": None, "granularity": "layer", "layers": "L1"}
#: What of a run -> its keys.
MODES: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "a layer": LAYER,
    "dot product": {"similarity": "dot"},
    "memory": {"memory": 6},
    "all text": {"pooling": "text"},
    "last token": {"pooling": "last"},
    "gradient caching": {"accumulate": "gradcache", "memory": 6},
    "cka": {"objective": "cka"},
    "feature_pooled": {"objective": "feature_pooled"},
    "feature": {"objective": "feature"},
    "viral": {**LAYER, "objective": "viral"},
    "jarvis": {**LAYER, "objective": "jarvis"},
    "ross": {**LAYER, "layers": "final", "objective": f"{SmallRoss.__module__}:SmallRoss"},
}


class From(TrainerCallback):
    """Counts from the step on in which all that is looked at once has been."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.on = state.global_step >= FIRST

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.on = False


@pytest.fixture(autouse=True)
def image_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligner, "_image_processor", lambda configuration: student_processor())


def run(folder: Path, **keys: Any) -> Waits:
    """Steps on a mix of samples with and without an image."""
    steps = 2 if keys.get("accumulate") == "gradcache" else 1
    model = vlm("llava-llama")
    rows = image_rows(model, STEPS * BATCH * steps)
    if keys.get("objective") not in ("feature", "viral", "jarvis"):
        for row in rows[1 :: BATCH + 1]:
            row["images"] = []
    teacher = autoencoder_folder() if "ross" in keys.get("objective", "").lower() else teacher_folder()
    config = HeraConfig(**{"heads": "L1H0,L0H2", "teacher": teacher, "k": 2, "weight": 1.0, **keys})
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1000, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=steps,
    )  # fmt: skip
    waits = Waits()
    waits.on = False
    trainer = HeraTrainer(
        model, args, hera=config, train_dataset=rows, data_collator=collate_rows, callbacks=[From(waits)]
    )
    with waits:
        trainer.train()
    return waits


@pytest.mark.parametrize("mode", MODES)
def test_the_host_waits_for_nothing_of_ours(tmp_path: Path, mode: str) -> None:
    waits = run(tmp_path, **MODES[mode])
    assert waits.host  # its own, so the counter sees
    assert not waits.ours


def test_neither_where_the_cache_lacks_features_nor_where_it_has_them(tmp_path: Path) -> None:
    for _ in ("misses", "hits"):
        waits = run(tmp_path / "run", teacher_cache=str(tmp_path / "cache"), memory=6)
        assert waits.host
        assert not waits.ours


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the device itself")
@pytest.mark.parametrize("cached", [False, True], ids=["on the fly", "cache"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "gradient caching"])
def test_a_gpu_is_never_waited_for(tmp_path: Path, mode: str, cached: bool) -> None:
    keys = {"heads": "L1H0,L0H2", "teacher": teacher_folder(), "k": 2, "weight": 1.0, **MODES[mode]}
    if "Ross" in keys.get("objective", ""):
        keys["teacher"] = autoencoder_folder()
    model = vlm("llava-llama").cuda()
    ours = Aligner(model, HeraConfig(**keys, teacher_cache=str(tmp_path) if cached else None))
    collate = ours.collator(collate_rows, drop=("images",))
    rows = image_rows(model, STEPS * BATCH)
    for step in range(STEPS):
        inputs = {n: t.cuda() for n, t in collate(rows[step * BATCH :][:BATCH]).items()}
        torch.cuda.set_sync_debug_mode("error" if step >= FIRST else "default")
        try:
            micro_batch = ours.prepare(inputs)
            torch.cuda.set_sync_debug_mode("default")  # the model itself waits
            loss = model(**inputs).loss
            torch.cuda.set_sync_debug_mode("error" if step >= FIRST else "default")
            (loss + ours.loss(micro_batch)).backward()
            ours.after_backward()
            ours.step(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert ours.logs()["hera_loss"] > 0
