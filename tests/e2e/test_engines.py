"""DDP, ZeRO-2 and ZeRO-3 through the real host; tests/engines compares every gradient, also under FSDP."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ..tiny_models import same
from .conftest import LORA
from .runner import ROOT, Run, run_command

pytestmark = pytest.mark.slow

CACHE = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".cache/torch_extensions"))
TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "hera_memory": 16}


@pytest.fixture(scope="module")
def extensions() -> dict[str, str]:
    """The environment in which DeepSpeed finds its CPU extension; compiling it once takes a minute or two."""
    lock = CACHE / "deepspeed_shm_comm/lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > 900:
        lock.unlink()  # a killed compilation leaves this lock, and loading the extension would wait for it forever
    code = (
        "from deepspeed.accelerator import get_accelerator; "
        "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
    )
    env = {"TORCH_EXTENSIONS_DIR": str(CACHE)}
    status, output = run_command(["python", "-c", code], ROOT, timeout=480, **env)
    if status != 0:
        lock.unlink(missing_ok=True)
        pytest.fail(f"DeepSpeed's CPU extension cannot be compiled: {output}")
    return env


def keys_of(name: str, world: Path) -> dict[str, Any]:
    """Returns the keys that choose an engine: a DeepSpeed file of the recipes, changed for a CPU."""
    if name == "DDP":
        return {}
    config = json.loads((ROOT / f"recipes/deepspeed/{name}.json").read_text(encoding="utf-8"))
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    (world / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    # With use_cpu the Trainer does not initialize DeepSpeed. Without a visible GPU the run is on the CPU anyway.
    return {"deepspeed": f"{name}.json", "use_cpu": False}


def _run(train: Callable[..., Run], env: dict[str, str], *args: dict[str, Any]) -> Run:
    return train(TWO, *args, ranks=2, env=env | {"CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(("tuning", "engines"), [({}, ("zero2", "zero3")), (LORA, ("zero3",))], ids=["full", "lora"])
def test_engines_give_equal_losses(train, world, extensions, tuning, engines):
    if tuning:  # under ZeRO-3, a new adapter draws other random numbers, so all engines load the same one
        tuning = tuning | {"adapter_name_or_path": str(train(tuning, {"max_steps": 1}).folder)}
    ddp, *others = (
        _run(train, extensions, tuning, keys_of(name, world), {"max_steps": 3}).logs() for name in ("DDP", *engines)
    )
    for other in others:
        for step, (found, expected) in enumerate(zip(other, ddp, strict=True)):
            comparable = ["hera_loss", "hera_mknn"] if step else []  # the first step fills the memory
            for key in ("loss", "lm_loss", *comparable, "hera_temperature"):
                assert found[key] == pytest.approx(expected[key], rel=1e-5), key
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


# DDP cannot resume on a CPU, even without HeRA: torch.load refuses the Trainer's map_location ("tagged with cpu:0").
def test_zero3_resumes_weights_temperature_and_memory(train, world, extensions):
    args = keys_of("zero3", world) | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = _run(train, extensions, args)
    resumed = _run(train, extensions, args, {"resume_from_checkpoint": str(whole.folder / "checkpoint-2")})
    for file in ("model.safetensors", "hera/state.safetensors"):
        found, expected = load_file(resumed.folder / file), load_file(whole.folder / file)
        assert same(found, expected), file
    before = load_file(whole.folder / "checkpoint-2/hera/state.safetensors")
    assert (before["optimizer.log_temperature.step"], expected["optimizer.log_temperature.step"]) == (2, 4)
    assert expected["memory.teacher"].shape[0] == TWO["hera_memory"]
    assert expected["objective.log_temperature"] != before["objective.log_temperature"]
