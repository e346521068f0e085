"""What happens when a run meets a fault: killed, a rank lost, disk full, not finite, damaged or exchanged files."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .runner import HostServer, Run

pytestmark = pytest.mark.slow

#: The length of a head in the demo model.
HEAD_DIM = 16


@pytest.fixture(scope="module")
def settings(recipe: dict) -> dict[str, Any]:
    """Twelve steps with a memory, saved after every fourth: what is done after a save is done before the next one."""
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, "overwrite_output_dir": False}
    return recipe | saving | {"per_device_train_batch_size": 4, "hera_memory": 16}


@pytest.fixture(scope="module")
def whole(server: HostServer, world: Path, settings: dict) -> Run:
    """The run that nothing happens to."""
    run = server.run(settings | {"output_dir": "saves/whole"}, world)
    assert run.ok, run.output
    return run


def _steps_logged(folder: Path) -> int:
    log = folder / "trainer_log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _meanwhile(run: Callable[[], Run], ready: Callable[[], bool], act: Callable[[], None]) -> Run:
    """Does something once, as soon as a run has come so far."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while not future.done():
            if ready():
                act()
                break
            time.sleep(0.01)
        return future.result()


def _ranks(server: HostServer) -> list[int]:
    """The processes of the run, by rank."""
    pid = server._process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _assert_equal_weights(ours: Path, theirs: Path) -> None:
    for file in ("model.safetensors", "hera/state.safetensors"):
        left, right = load_file(ours / file), load_file(theirs / file)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in right), file


def test_killed_at_a_random_step_and_resumed(server: HostServer, world: Path, settings: dict, whole: Run) -> None:
    step = random.SystemRandom().choice([4, 5, 8, 9])
    args = settings | {"output_dir": f"saves/killed_{step}"}
    folder, stop = world / args["output_dir"], world / f"stop_{step}"
    saved = folder / f"checkpoint-{step - step % 4}/trainer_state.json"
    killed = _meanwhile(
        lambda: server.run(args, world, kill_when=stop),
        lambda: _steps_logged(folder) >= step and saved.exists(),
        stop.touch,
    )
    assert killed.codes == [124], killed.output
    assert not (folder / "model.safetensors").exists()
    resumed = server.run(args | {"resume_from_checkpoint": True}, world)
    assert resumed.ok, resumed.output
    _assert_equal_weights(resumed.folder, whole.folder)


def test_the_others_end_when_a_rank_dies(server: HostServer, world: Path, settings: dict) -> None:
    args = settings | {"output_dir": "saves/lost", "ddp_backend": "gloo", "max_steps": 500, "save_strategy": "no"}
    run = _meanwhile(
        lambda: server.run(args, world, ranks=2, timeout=120),
        lambda: _steps_logged(world / args["output_dir"]) >= 2,
        lambda: os.kill(_ranks(server)[1], signal.SIGKILL),
    )
    assert run.codes == [1, -signal.SIGKILL], run.output


def test_no_room_while_saving_leaves_the_checkpoint_before(
    server: HostServer, world: Path, settings: dict, whole: Run
) -> None:
    args = settings | {"output_dir": "saves/full", "save_total_limit": 1}
    folder = world / args["output_dir"]

    def forbid_large_files() -> None:
        # from now on the kernel refuses to let a file grow beyond this, as a full disk does: logs fit, weights do not
        resource.prlimit(_ranks(server)[0], resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))

    failed = _meanwhile(
        lambda: server.run(args, world), (folder / "checkpoint-4/trainer_state.json").exists, forbid_large_files
    )
    assert failed.codes == [1]
    assert "File too large" in failed.output
    assert not (folder / "checkpoint-8/trainer_state.json").exists()
    refused = server.run(args | {"resume_from_checkpoint": True}, world)
    assert refused.codes == [1]
    unfinished, before = args["output_dir"] + "/checkpoint-8", args["output_dir"] + "/checkpoint-4"
    assert f"resume_from_checkpoint: {unfinished} has no trainer_state.json" in refused.output
    assert f"Remove it, and resume {before}." in refused.output
    assert "loading weights file" not in refused.output
    resumed = server.run(settings | {"output_dir": "saves/full_resumed", "resume_from_checkpoint": before}, world)
    assert resumed.ok, resumed.output
    _assert_equal_weights(resumed.folder, whole.folder)


@pytest.fixture(scope="module")
def overflowing(world: Path) -> str:
    """The demo model with L1H0 so large that its dot products overflow, and nothing else does."""
    folder = world / "overflowing"
    shutil.copytree(world / "hera_demo/model", folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.o_proj.weight"))
    weights[name][:, :HEAD_DIM] *= 1e20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_term_that_is_not_finite_is_left_out_and_counted(
    server: HostServer, world: Path, recipe: dict, overflowing: str
) -> None:
    args = {"model_name_or_path": overflowing, "hera_similarity": "dot", "max_steps": 3, "output_dir": "saves/nan"}
    run = server.run(recipe | args, world)
    assert run.ok, run.output
    for line in run.logs():
        assert line["hera_nan_steps"] == 1
        assert line["loss"] == pytest.approx(line["lm_loss"])
        assert "hera_loss" not in line
    weights = load_file(run.folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_term_that_stays_not_finite_stops_every_rank_with_the_name_of_the_head(
    server: HostServer, world: Path, recipe: dict, overflowing: str
) -> None:
    args = {"model_name_or_path": overflowing, "hera_similarity": "dot", "hera_max_nan": 2, "ddp_backend": "gloo"}
    run = server.run(recipe | args | {"output_dir": "saves/nan_stop", "max_steps": 20}, world, ranks=2)
    assert run.codes == [1, 1]
    assert run.output.count("not finite in 2 steps in a row (hera_max_nan), because of L1H0.") >= 2
    assert _steps_logged(run.folder) == 1


def test_the_features_of_a_corrupt_cache_file_are_computed_again(
    server: HostServer, world: Path, recipe: dict
) -> None:
    cache = "saves/cache_cut"
    args = recipe | {"hera_teacher_cache": cache, "max_steps": 2, "dataloader_num_workers": 1}
    first = server.run(args | {"output_dir": f"{cache}_first"}, world)
    assert first.ok, first.output
    (shard,) = (world / cache).rglob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    second = server.run(args | {"output_dir": f"{cache}_second"}, world)
    assert second.ok, second.output
    assert f"{shard.name} (" in second.output
    assert [line["hera_loss"] for line in second.logs()] == [line["hera_loss"] for line in first.logs()]
    (rebuilt,) = set((world / cache).rglob("*.safetensors")) - {shard}
    assert rebuilt.stat().st_size == len(content)


@pytest.mark.parametrize("changed", ["heads", "heads file", "teacher", "temperature"])
def test_heads_or_teacher_changed_before_resuming_are_refused(
    server: HostServer, world: Path, settings: dict, whole: Run, changed: str
) -> None:
    args = {"resume_from_checkpoint": str(whole.folder / "checkpoint-4"), "output_dir": f"saves/changed_{changed}"}
    key = "hera_heads"
    if changed == "heads":
        args[key] = "L1H0,L1H3,L2H5,L3H2,L3H6"
    elif changed == "heads file":
        (world / "changed.json").write_text('{"heads": ["L1H0"]}')
        args[key] = "changed.json"
    elif changed == "temperature":
        key = "hera_fixed_temperature"
        args |= {key: True, "hera_temperature": 0.5}
    else:
        key = "hera_teacher"
        shutil.copytree(world / "hera_demo/teacher", world / "changed_teacher")
        weights = load_file(world / "changed_teacher/model.safetensors")
        next(iter(weights.values())).mul_(1.5)
        save_file(weights, world / "changed_teacher/model.safetensors", metadata={"format": "pt"})
        args[key] = "changed_teacher"
    run = server.run(settings | args, world)
    assert run.codes == [1]
    assert f"resume_from_checkpoint: this run differs from the one that wrote {whole.folder}" in run.output
    assert "loading weights file" not in run.output
    assert f"{key} was " in run.output


def test_other_settings_than_the_checkpoint_s_are_warned_of(
    server: HostServer, world: Path, settings: dict, whole: Run
) -> None:
    args = {"resume_from_checkpoint": str(whole.folder / "checkpoint-4"), "output_dir": "saves/other_k", "hera_k": 3}
    run = server.run(settings | args, world)
    assert run.ok, run.output
    assert "hera_k was 10, is 3" in run.output
    assert "hera_weight was" not in run.output
