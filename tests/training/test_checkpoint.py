"""The choice of the checkpoint to resume; incomplete checkpoints and checkpoints of other runs are refused."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.training.checkpoint import RunIdentity, checkpoint_of, load_renamed_weights
from tests.tiny_models import text_model, vlm

HEADS = Targets.parse("L0H1,L2H3")
STATE = {"objective.log_temperature": torch.tensor(0.5)}


def arguments(resume: object, folder: Path) -> SimpleNamespace:
    return SimpleNamespace(resume_from_checkpoint=resume, output_dir=str(folder))


def run(targets: str = str(HEADS), digest: str = "digest", n_trained: int | None = 8, **keys: Any) -> RunIdentity:
    return RunIdentity(Targets.parse(targets), digest, HeraConfig(heads=str(HEADS), **keys), n_trained)


def test_the_last_or_the_named_checkpoint_is_resumed(tmp_path):
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for nothing in (None, False, "false", "False", ""):
        assert checkpoint_of(arguments(nothing, tmp_path)) is None
    for last in (True, "true", "True"):
        assert checkpoint_of(arguments(last, tmp_path)) == str(tmp_path / "checkpoint-12")
    named = str(tmp_path / "checkpoint-8")
    assert checkpoint_of(arguments(named, tmp_path)) == named


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_missing_checkpoint_is_refused(tmp_path, folder):
    for resume in (True, str(tmp_path / "checkpoint-9")):
        with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint-.* does not exist; set the key"):
            checkpoint_of(arguments(resume, tmp_path / folder))


def test_a_checkpoint_that_was_not_saved_completely_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint-12"
    (checkpoint / "hera").mkdir(parents=True)  # HeRA's part is written first
    (checkpoint / "hera/state.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"^resume_from_checkpoint: {re.escape(str(checkpoint))} is incomplete"):
        run().check(checkpoint)


@pytest.mark.parametrize(
    ("now", "entry"),
    [
        ({"objective": "cka"}, "hera_objective was contrastive, is cka"),
        ({"pooling": "text"}, "hera_pooling was answer, is text"),
        ({"similarity": "dot"}, "hera_similarity was cosine, is dot"),
        ({"targets": "L2H3,L0H1"}, "hera_heads was L0H1,L2H3, is L2H3,L0H1"),
        ({"digest": "other"}, "hera_teacher was digest, is other"),
        ({"n_trained": 3}, "trained_tensors was 8, is 3"),
    ],
)
def test_a_run_that_aligns_something_else_is_refused(tmp_path, now, entry):
    run().save(tmp_path, STATE, {})
    assert run().load(tmp_path).keys() == STATE.keys()
    for call in (run(**now).load, run(**now).check):
        with pytest.raises(
            ValueError, match=rf"^resume_from_checkpoint: this run differs from .*: (.*; )?{entry}.* Restore the old"
        ):
            call(tmp_path)


def test_changes_that_are_allowed_give_a_warning(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run().save(tmp_path, STATE, {})
    # a learned temperature continues from the checkpoint, so its initial value may change
    run(temperature=0.5, max_nan=3, teacher="moved/teacher").load(tmp_path)
    run(n_trained=None).check(tmp_path)  # before the model is loaded
    assert not [record for record in caplog.records if record.name.startswith("llamafactory_hera")]
    run(weight=0.5, k=3).load(tmp_path)
    assert (
        "resume_from_checkpoint: hera_weight was 0.01, is 0.5; hera_k was 10, is 3. The run continues" in caplog.text
    )


@pytest.mark.parametrize("damage", ["no folder", "half a file", "no keys"])
def test_a_checkpoint_without_a_complete_hera_folder_is_refused(tmp_path, damage):
    if damage != "no folder":
        run().save(tmp_path, STATE, {})
        state = tmp_path / "hera/state.safetensors"
        if damage == "half a file":
            state.write_bytes(state.read_bytes()[:-2])
        else:
            (tmp_path / "hera/run.json").unlink()
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .* has no complete hera/ folder .*damaged"):
        run().check(tmp_path)


def test_weights_that_were_renamed_on_saving_are_loaded_in_their_dtypes(tmp_path):
    saved, other = vlm("llava-llama", seed=1), vlm("llava-llama", seed=2)
    for model in (saved, other):
        model.model.vision_tower.to(torch.bfloat16)
    assert other.dtype == torch.bfloat16  # the dtype of the first parameter
    saved.save_pretrained(tmp_path)
    assert load_renamed_weights(other, tmp_path)
    loaded = other.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.state_dict().items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16, torch.float32}
    read = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)  # as another program reads it
    assert torch.equal(read.lm_head.weight, saved.lm_head.weight)
    assert not load_renamed_weights(other, tmp_path / "without weights")


@pytest.mark.parametrize("kind", ["renamed", "same names", "adapter"])
def test_weights_without_a_tensor_of_the_model_are_refused(tmp_path, kind):
    model = vlm("llava-llama") if kind == "renamed" else text_model("qwen3", tie_word_embeddings=True)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    assert load_renamed_weights(model, tmp_path) == (
        kind == "renamed"
    )  # complete, although tied weights are saved once
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights[removed := next(name for name in weights if "layers.1.self_attn.k_proj" in name)]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"^resume_from_checkpoint: .* lacks 1 tensors of the model, such as .*{removed[-20:]}; res"
    ):
        load_renamed_weights(model, tmp_path)
