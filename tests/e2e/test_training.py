"""Training through the real host: what is logged, what comes out, and that nothing else changes."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import llamafactory
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from llamafactory_hera.integrations.llamafactory.commands import score_checkpoint
from llamafactory_hera.selection.scores import compare

from .runner import ROOT, HostServer, run_command, write_recipe

pytestmark = pytest.mark.slow

HERA_KEYS = {"lm_loss", "hera_loss", "hera_mknn", "hera_mknn_chance", "hera_temperature"}
LORA = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "multi_modal_projector", "lora_rank": 4}


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_curves_reach_every_log_and_the_picture(server: HostServer, world: Path, recipe: dict) -> None:
    run = server.run(recipe | {"output_dir": "saves/logs", "plot_loss": True, "report_to": "tensorboard"}, world)
    assert run.ok, run.output
    assert all(line.keys() >= HERA_KEYS for line in run.logs())
    lines = [json.loads(line) for line in (run.folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["hera_loss"] for line in lines if "loss" in line] == [line["hera_loss"] for line in run.logs()]
    for curve in ("lm_loss", "hera_loss", "hera_mknn", "hera_temperature"):
        assert (run.folder / f"training_{curve}.png").stat().st_size > 5000
    events = b"".join(path.read_bytes() for path in run.folder.rglob("events.out.*"))
    assert all(f"train/{key}".encode() in events for key in HERA_KEYS)
    first = run.logs()[0]
    assert first["loss"] == pytest.approx(first["lm_loss"] + recipe["hera_weight"] * first["hera_loss"], rel=1e-6)
    assert "HeRA | heads: L1H0,L1H3,L2H5,L3H2,L3H7" in run.output


@pytest.mark.parametrize(
    "change", [{"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True}], ids=["non-reentrant", "none"]
)
@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(
    server: HostServer, world: Path, recipe: dict, change: dict, tuning: dict
) -> None:
    default = server.run(recipe | tuning | {"output_dir": "saves/checkpointing"}, world)
    other = server.run(recipe | tuning | change | {"output_dir": "saves/checkpointing_other"}, world)
    assert default.ok, default.output
    assert other.ok, other.output
    for ours, theirs in zip(default.logs(), other.logs(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_hera_changes_the_weights_and_its_weight_matters(server: HostServer, world: Path, recipe: dict) -> None:
    runs = {
        weight: server.run(recipe | {"output_dir": f"saves/weight_{weight}", "hera_weight": weight}, world)
        for weight in (0.0, 0.1)
    }
    sft = server.run(
        {k: v for k, v in recipe.items() if not k.startswith("hera_")} | {"stage": "sft", "output_dir": "saves/plain"},
        world,
    )
    assert all(run.ok for run in (*runs.values(), sft))
    plain, idle, aligned = (load_file(run.folder / "model.safetensors") for run in (sft, runs[0.0], runs[0.1]))
    # the appended rows may change the rounding of a matrix product, nothing more
    assert all(torch.allclose(idle[name], plain[name], atol=1e-5) for name in plain)
    assert not all(torch.allclose(aligned[name], plain[name], atol=1e-5) for name in plain)


def test_the_demo_aligns_its_heads_and_plain_training_does_not(
    server: HostServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run_command([sys.executable, str(ROOT / "recipes/demo")], tmp_path, timeout=300)
    assert code == 0, output
    files, recipes = [], {name: ROOT / f"recipes/demo/{name}.yaml" for name in ("sft", "hera")}
    held_out = ["hera_select_mode=mllm", "dataset=hera_demo_heldout", "hera_select_samples=128"]
    for recipe in recipes.values():
        run = server.run(yaml.safe_load(recipe.read_text()), tmp_path, timeout=400)
        assert run.ok, run.output
        files.append(score_checkpoint(run.folder, recipes["hera"], overrides=held_out))
    plain, aligned = compare(files, aligned="saves/demo_hera/hera/heads.json").groups["aligned"]["mean"]
    assert aligned > plain + 0.05, f"{plain:.4f} without HeRA, {aligned:.4f} with it"


def test_sft_is_bit_identical_with_the_plugin_switched_off(server: HostServer, world: Path, recipe: dict) -> None:
    # a template of the host's own: llava_qwen3 comes with the plugin
    sft = {k: v for k, v in recipe.items() if not k.startswith("hera_")} | {"stage": "sft", "template": "llava"}
    with_plugin = server.run(sft | {"output_dir": "saves/sft_with"}, world)
    file = write_recipe(world / "sft.yaml", sft | {"output_dir": "saves/sft_without"})
    code, output = run_command(["llamafactory-cli", "train", str(file)], world, HERA_DISABLE="1")
    assert with_plugin.ok, with_plugin.output
    assert code == 0, output
    assert _hash(with_plugin.folder) == _hash(world / "saves/sft_without")


def test_hera_disable_switches_the_stage_off(world: Path, recipe: dict) -> None:
    file = write_recipe(world / "off.yaml", recipe | {"output_dir": "saves/off"})
    code, output = run_command(["llamafactory-cli", "train", str(file)], world, HERA_DISABLE="1")
    assert code != 0
    assert "hera_heads" in output


def test_two_processes_under_torchrun(world: Path, recipe: dict) -> None:
    halves = {"output_dir": "saves/torchrun", "per_device_train_batch_size": 8, "ddp_backend": "gloo", "max_steps": 2}
    file = write_recipe(world / "torchrun.yaml", recipe | halves)
    command = ["llamafactory-cli", "train", str(file)]
    code, output = run_command(command, world, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert code == 0, output
    assert "global batch: 16 (2 processes x 8 x 1 accumulation steps)" in output
    state = json.loads((world / "saves/torchrun/trainer_state.json").read_text())
    assert all(line["hera_loss"] > 0 for line in state["log_history"] if "loss" in line)


def test_accelerate_launch_finds_the_stage(world: Path, recipe: dict) -> None:
    # accelerate starts several CPU processes through MPI alone, so this is one process
    file = write_recipe(world / "accelerate.yaml", recipe | {"output_dir": "saves/accelerate", "max_steps": 2})
    entry = Path(llamafactory.__file__).with_name("launcher.py")
    command = ["accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(entry), str(file)]
    code, output = run_command(command, world)
    assert code == 0, output
    assert "HeRA | heads" in output


def test_two_processes_compute_the_term_of_one(server: HostServer, world: Path, recipe: dict) -> None:
    # the host averages the LM loss per process, so only the HeRA term of the first steps is comparable here;
    # gradients per parameter are compared in tests/engines
    one = server.run(recipe | {"output_dir": "saves/one", "max_steps": 2}, world)
    halves = {"output_dir": "saves/two", "max_steps": 2, "per_device_train_batch_size": 8, "ddp_backend": "gloo"}
    two = server.run(recipe | halves, world, ranks=2)
    assert one.ok, one.output
    assert two.ok, two.output
    for alone, together in zip(one.logs(), two.logs(), strict=True):
        for key in ("hera_loss", "hera_mknn", "hera_temperature"):
            assert together[key] == pytest.approx(alone[key], rel=1e-5)


def test_checkpoint_is_a_plain_model(server: HostServer, world: Path, recipe: dict) -> None:
    run = server.run(recipe | {"output_dir": "saves/plain_model", "save_strategy": "steps", "save_steps": 3}, world)
    assert run.ok, run.output
    base = _names(world / "hera_demo/model/model.safetensors")
    beside = {"heads.json", "run.json", "state.safetensors"}
    for folder, expected in ((run.folder, beside | {"card.json"}), (run.folder / "checkpoint-3", beside)):
        assert _names(folder / "model.safetensors") == base
        assert {path.name for path in (folder / "hera").iterdir()} == expected
    code = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor; "
        f"AutoModelForImageTextToText.from_pretrained({str(run.folder)!r}); "
        f"AutoProcessor.from_pretrained({str(run.folder)!r}); "
        "assert not any(name.startswith(('llamafactory_hera', 'llamafactory')) for name in sys.modules)"
    )
    status, output = run_command(["python", "-c", code], world, HERA_DISABLE="1")
    assert status == 0, output


def test_adapter_exports_and_chats_without_the_plugin(server: HostServer, world: Path, recipe: dict) -> None:
    run = server.run(recipe | LORA | {"output_dir": "saves/adapter"}, world)
    assert run.ok, run.output
    assert all(
        "lora_" in name or "multi_modal_projector" in name for name in _names(run.folder / "adapter_model.safetensors")
    )
    # the host's own template names must do: llava_qwen3 belongs to the plugin
    settings = {
        "model_name_or_path": "hera_demo/model",
        "adapter_name_or_path": "saves/adapter",
        "template": "qwen3_nothink",
        "finetuning_type": "lora",
        "trust_remote_code": False,
    }
    file = write_recipe(world / "export.yaml", settings | {"export_dir": "saves/exported", "export_device": "cpu"})
    status, output = run_command(["llamafactory-cli", "export", str(file)], world, HERA_DISABLE="1")
    assert status == 0, output
    assert _names(world / "saves/exported/model.safetensors") == _names(world / "hera_demo/model/model.safetensors")
    chat = (
        "from llamafactory.chat import ChatModel; "
        f"model = ChatModel({settings | {'infer_dtype': 'float32'}!r}); "
        "print('ANSWER', model.chat([{'role': 'user', 'content': 'how many circles?'}], max_new_tokens=4)[0])"
    )
    status, output = run_command(["python", "-c", chat], world, HERA_DISABLE="1")
    assert status == 0, output
    assert "ANSWER" in output


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_resume_after_a_kill_gives_the_weights_of_an_uninterrupted_run(
    server: HostServer, world: Path, recipe: dict, tuning: dict
) -> None:
    settings = (
        recipe
        | tuning
        | {
            "save_strategy": "steps",
            "save_steps": 4,  # the kill comes before the next save
            "hera_memory": 24,
            "per_device_train_batch_size": 4,
            "overwrite_output_dir": False,
            "max_steps": 12,
        }
    )
    name = f"resume_{'lora' if tuning else 'full'}"
    whole = server.run(settings | {"output_dir": f"saves/{name}_whole"}, world)
    killed_at = world / f"saves/{name}/checkpoint-4/trainer_state.json"
    killed = server.run(settings | {"output_dir": f"saves/{name}"}, world, kill_when=killed_at)
    assert killed.codes == [124]
    assert not (killed.folder / "checkpoint-12").exists()
    resumed = server.run(settings | {"output_dir": f"saves/{name}", "resume_from_checkpoint": True}, world)
    assert whole.ok, whole.output
    assert resumed.ok, resumed.output
    weights = "adapter_model.safetensors" if tuning else "model.safetensors"
    for file in (weights, "hera/state.safetensors"):
        ours, theirs = load_file(resumed.folder / file), load_file(whole.folder / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file


def test_text_only_batches_and_samples_train(server: HostServer, world: Path, recipe: dict) -> None:
    mixed = {
        "dataset": "hera_demo,hera_demo_text",
        "per_device_train_batch_size": 4,
        "hera_memory": 16,
        "max_steps": 12,
    }
    run = server.run(recipe | mixed | {"output_dir": "saves/mixed"}, world)
    assert run.ok, run.output
    assert any(line.get("hera_loss", 0) > 0 for line in run.logs())
    assert all(line["loss"] > 0 for line in run.logs())
    assert all(("hera_empty_steps" in line) == (line["hera_loss"] == 0) for line in run.logs())


def test_cached_teacher_features_change_nothing(server: HostServer, world: Path, recipe: dict) -> None:
    without = {k: v for k, v in recipe.items() if k != "hera_teacher_cache"}
    fresh = server.run(without | {"output_dir": "saves/uncached"}, world)
    cache = {"hera_teacher_cache": "saves/cache"}
    filling = server.run(without | cache | {"output_dir": "saves/filling"}, world)
    cached = server.run(without | cache | {"output_dir": "saves/cached", "dataloader_num_workers": 2}, world)
    for run in (fresh, filling, cached):
        assert run.ok, run.output
    for a, b, c in zip(fresh.logs(), filling.logs(), cached.logs(), strict=True):
        assert a["hera_loss"] == pytest.approx(b["hera_loss"], rel=1e-3)  # a cache keeps fp16
        assert b["hera_loss"] == pytest.approx(c["hera_loss"], rel=1e-6)


@pytest.mark.parametrize(("batch", "memory"), [(1, 2), (1, 40), (2, 40)])
def test_a_single_candidate_in_the_first_step_is_no_idle_run(
    server: HostServer, world: Path, recipe: dict, batch: int, memory: int
) -> None:
    # who has one candidate has no neighbor: no gradient yet, and nothing wrong with the heads
    small = {"per_device_train_batch_size": batch, "hera_memory": memory, "output_dir": "saves/single"}
    run = server.run(recipe | small, world)
    assert run.ok, run.output


def test_a_run_without_any_comparison_says_so(server: HostServer, world: Path, recipe: dict) -> None:
    data = world / "data_same"
    shutil.copytree(world / "hera_demo/data", data)
    info = json.loads((data / "dataset_info.json").read_text())
    file = data / info["hera_demo"]["file_name"]
    samples = json.loads(file.read_text())
    file.write_text(json.dumps([sample | {"images": samples[0]["images"]} for sample in samples]))
    run = server.run(recipe | {"dataset_dir": str(data), "output_dir": "saves/same", "max_steps": 2}, world)
    assert run.ok, run.output
    assert "The HeRA term was 0 in all 2 steps so far" in run.output
    assert "hera_mknn" not in run.logs()[-1]


def test_the_best_model_is_what_is_saved(server: HostServer, world: Path, recipe: dict) -> None:
    best = {
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the first is the best
        "output_dir": "saves/best",
    }
    run = server.run(recipe | best, world)
    assert run.ok, run.output
    saved, first, last = (
        load_file(folder / "model.safetensors")
        for folder in (run.folder, run.folder / "checkpoint-2", run.folder / "checkpoint-6")
    )
    assert all(torch.equal(saved[name], first[name]) for name in first)
    assert not all(torch.equal(saved[name], last[name]) for name in first)


def test_a_damaged_state_is_named(server: HostServer, world: Path, recipe: dict) -> None:
    saving = {"output_dir": "saves/damaged", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    assert server.run(recipe | saving, world).ok
    state = world / "saves/damaged/checkpoint-2/hera/state.safetensors"
    state.write_bytes(state.read_bytes()[:20])
    resume = {"resume_from_checkpoint": "saves/damaged/checkpoint-2", "max_steps": 4}
    run = server.run(recipe | saving | resume, world)
    assert not run.ok
    assert "ValueError: resume_from_checkpoint: saves/damaged/checkpoint-2 holds no whole hera/ folder" in run.output
