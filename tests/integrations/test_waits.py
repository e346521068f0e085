"""After the first steps, HeRA never makes the program wait for the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llamafactory_hera.training import Aligner
from tests.integrations.test_transformers import BATCH, hera, trainer_of
from tests.tiny_models import autoencoder_folder, collate_rows, image_rows, student_processor, vlm
from tests.training.test_tokens import SmallRoss
from tests.waits import Waits

STEPS, FIRST = 6, 3
LAYER = {"heads": None, "granularity": "layer", "layers": "L1"}
ROSS = {"layers": "final", "objective": f"{SmallRoss.__module__}:SmallRoss", "teacher": autoencoder_folder()}
MODES: dict[str, dict[str, Any]] = {
    "contrastive": {"memory": 6},
    "a layer, dot product": {**LAYER, "similarity": "dot"},
    "all text": {"pooling": "text"},
    "last token": {"pooling": "last"},
    "gradient caching": {"accumulate": "gradcache", "memory": 6},
    "cka": {"objective": "cka"},
    "feature": {"objective": "feature"},
    "viral": {**LAYER, "objective": "viral"},
    "jarvis": {**LAYER, "objective": "jarvis"},
    "ross": {**LAYER, **ROSS},
}


class CountLaterSteps(TrainerCallback):
    """Counts waits only in later steps, because HeRA checks everything once in the first steps."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        waits.on = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.on = state.global_step >= FIRST

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits.on = False


def waits_of(folder: Path, mode: str, **keys: Any) -> Waits:
    """Trains on samples with and without an image, and counts the waits."""
    steps = 2 if mode == "gradient caching" else 1
    model = vlm("llava-llama")
    rows = image_rows(model, STEPS * BATCH * steps)
    if mode not in ("feature", "viral", "jarvis"):
        for row in rows[1 :: BATCH + 1]:
            row["images"] = []
    waits = Waits()
    given: dict[str, Any] = {"callbacks": [CountLaterSteps(waits)]}  # called before HeRA's callback ends the run
    given["processing_class"] = SimpleNamespace(image_processor=student_processor())
    settings = {"max_steps": STEPS, "logging_steps": 1000, "gradient_accumulation_steps": steps, "given": given}
    trainer = trainer_of(folder, model, rows, hera=MODES[mode] | keys, **settings)
    with waits:
        trainer.train()
    return waits


@pytest.mark.parametrize("mode", MODES)
def test_hera_never_waits(tmp_path, mode):
    waits = waits_of(tmp_path, mode)
    assert waits.host  # the counter sees the waits of the Trainer itself
    assert not waits.ours


def test_hera_waits_only_to_fill_the_cache(tmp_path):
    filling, reading = (waits_of(tmp_path / "run", "contrastive", teacher_cache=str(tmp_path)) for _ in range(2))
    assert filling.ours
    assert all("teacher_features.py" in place for place in filling.ours)
    assert not reading.ours


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "gradient caching"])
def test_hera_never_waits_for_a_gpu(mode):
    model = vlm("llava-llama").cuda()
    aligner = Aligner(model, hera(**MODES[mode]), image_processor=student_processor())
    collate = aligner.collator(collate_rows, drop=("images",))
    rows = image_rows(model, STEPS * BATCH)
    for step in range(STEPS):
        strict = "error" if step >= FIRST else "default"
        inputs = {name: tensor.cuda() for name, tensor in collate(rows[step * BATCH :][:BATCH]).items()}
        try:
            torch.cuda.set_sync_debug_mode(strict)
            prepared = aligner.prepare(inputs)
            torch.cuda.set_sync_debug_mode("default")  # the model itself waits
            loss = model(**inputs).loss
            torch.cuda.set_sync_debug_mode(strict)
            (loss + aligner.loss(prepared)).backward()
            aligner.after_backward()
            aligner.optimizer_step(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert aligner.logs()["hera_loss"] > 0
