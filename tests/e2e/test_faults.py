"""Faults of a run: a kill, a full disk, values that are not finite, and bad input."""

import random
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ..tiny_models import same
from .runner import Run

pytestmark = pytest.mark.slow

HEAD_DIM = 16  # of the demo model
#: Twelve steps with a memory and a checkpoint after every fourth, so that a test can act between two checkpoints.
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, "overwrite_output_dir": False}
SAVING |= {"per_device_train_batch_size": 4, "hera_memory": 16}


def _steps_logged(folder: Path) -> int:
    log = folder / "trainer_log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _meanwhile(run: Callable[[], Run], ready: Callable[[], bool], act: Callable[[], None]) -> Run:
    """Starts a run, and calls ``act`` once ``ready`` returns True."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while not future.done():
            if ready():
                act()
                break
            time.sleep(0.01)
        return future.result()


def test_a_run_killed_at_a_random_step_resumes_to_the_weights_of_an_undisturbed_run(train, world):
    undisturbed = train(SAVING)
    step = random.SystemRandom().choice([4, 5, 8, 9])
    folder = world / f"saves/killed_{step}"
    args, stop = SAVING | {"output_dir": str(folder)}, folder.with_suffix(".stop")
    saved = folder / f"checkpoint-{step - step % 4}/trainer_state.json"
    killed = _meanwhile(
        lambda: train(args, ok=False, kill_when=stop),
        lambda: _steps_logged(folder) >= step and saved.exists(),
        stop.touch,
    )
    assert killed.codes == [124], killed.output
    assert not (folder / "checkpoint-12").exists()
    resumed = train(args, {"resume_from_checkpoint": True})
    for file in ("model.safetensors", "hera/state.safetensors"):
        assert same(load_file(resumed.folder / file), load_file(undisturbed.folder / file)), file


def test_a_full_disk_leaves_the_earlier_checkpoint_and_an_incomplete_one_is_refused(train, server, world):
    args = SAVING | {"output_dir": "saves/full_disk", "save_total_limit": 1}
    folder = world / args["output_dir"]

    def forbid_large_files() -> None:
        # Writes beyond this size now fail, as on a full disk: logs fit, weights do not.
        pid = server._process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        resource.prlimit(int(child), resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))

    saved = (folder / "checkpoint-4/trainer_state.json").exists
    failed = _meanwhile(lambda: train(args, ok=False), saved, forbid_large_files)
    assert "File too large" in failed.output
    assert not (folder / "checkpoint-8/trainer_state.json").exists()
    refused = train(args, {"resume_from_checkpoint": True}, ok=False)
    assert refused.error.startswith(f"resume_from_checkpoint: {args['output_dir']}/checkpoint-8 is incomplete")
    assert "loading weights file" not in refused.output
    assert train(args, {"resume_from_checkpoint": f"{args['output_dir']}/checkpoint-4", "max_steps": 5}).ok


def test_a_term_that_stays_non_finite_stops_every_rank_and_names_the_head(train, world):
    folder = world / "overflowing"
    shutil.copytree(world / "hera_demo/model", folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.o_proj.weight"))
    weights[name][:, :HEAD_DIM] *= 1e20  # only the dot products of L1H0 overflow
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    args = {"model_name_or_path": str(folder), "hera_similarity": "dot", "hera_max_nan": 2}
    run = train(args, ok=False, ranks=2)
    assert run.codes == [1, 1]
    assert run.output.count("not finite in 2 consecutive micro-batches (hera_max_nan), because of L1H0.") >= 2
    assert _steps_logged(run.folder) == 1


@pytest.fixture(scope="module")
def weightless(world: Path) -> str:
    """The demo model without weights: a run that tries to load them fails with a different error."""
    folder = world / "weightless"
    shutil.copytree(world / "hera_demo/model", folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


#: Case -> a change to the recipe, and parts of the message.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no teacher": ({"hera_teacher": "./no_teacher"}, ["hera_teacher: ./no_teacher"]),
    "a text-only model": ({"model_name_or_path": "hera_demo/language_model"}, ["model_name_or_path", "text-only"]),
    "text-only data": ({"dataset": "hera_demo_text"}, ["dataset: no image was found", "an `images` column"]),
    "image tokens cut off": ({"cutoff_len": 12}, ["cutoff_len: 12 cuts", "image tokens"]),
    "packing": ({"packing": True}, ["packing: True", "attend to each other; set neat_packing: true"]),
    "tokens of packed rows": (
        {"neat_packing": True, "hera_objective": "feature"},
        ["hera_objective: feature", "one sample per row", "contrastive"],
    ),
    "fp8": ({"fp8": True}, ["fp8: True", "multiples of 16", "remove"]),
    "output over the model": ({"output_dir": "weightless"}, ["output_dir: weightless", "model_name_or_path"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(train, weightless, name):
    change, parts = CASES[name]
    run = train({"model_name_or_path": weightless}, change, ok=False)
    assert all(part in run.error for part in parts), run.error
