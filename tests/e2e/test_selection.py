"""Head selection on the real host: from a recipe to heads, to a run that trains them, to the report afterwards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.llamafactory.commands import fill_teacher, score_checkpoint, select
from llamafactory_hera.selection.report import write_report

from .runner import HostServer, run_command, write_recipe

pytestmark = pytest.mark.slow

LORA = {"finetuning_type": "lora", "lora_target": "all", "additional_target": "multi_modal_projector", "lora_rank": 4}


@pytest.fixture
def chosen(recipe: dict) -> dict[str, Any]:
    """The recipe before any head is chosen."""
    return recipe | {"hera_heads": "auto", "hera_select_samples": 64, "hera_select_k": 8}


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's folder as the current one."""
    monkeypatch.chdir(world)
    return world


def write(here: Path, args: dict[str, Any], name: str = "recipe.yaml") -> Path:
    args = {key: value for key, value in args.items() if value is not None}
    return write_recipe(here / name, args)


def test_the_command_writes_heads_recipe_and_picture_and_the_recipe_trains(
    server: HostServer, here: Path, chosen: dict
) -> None:
    args = {key: value for key, value in chosen.items() if key != "hera_heads"} | {"output_dir": "saves/select"}
    path = write(here, args)
    text = path.read_text()
    code, output = run_command(
        ["llamafactory-hera", "select", str(path), "--in-place", "hera_select_mode=mllm", "hera_select_m=3"], here
    )
    assert code == 0, output
    assert "40 heads on 64 samples of hera_demo, teacher hera_demo/teacher, mode mllm, k=8, chance level" in output
    folder = here / "saves/select/hera"
    assert sorted(file.name for file in folder.iterdir()) == [
        ".lock",
        "heads.json",
        "heads.neighbors.safetensors",
        "heads.png",
        "run.yaml",
    ]
    heads = Targets.load(folder / "heads.json")
    assert len(heads.items) == 3
    assert f"selected (worst): {heads}" in output
    assert heads.provenance["keys"]["hera_select_mode"] == "mllm"
    assert output.rstrip().endswith("llamafactory-cli train saves/select/hera/run.yaml")
    place = next(line for line in text.splitlines() if line.startswith("hera_"))
    assert path.read_text() == text.replace(place, f"hera_heads: {heads}\n{place}", 1)

    run = server.run(yaml.safe_load((folder / "run.yaml").read_text()), here)
    assert run.ok, run.output
    assert f"HeRA | heads: {heads}" in run.output
    assert Targets.load(run.folder / "hera/heads.json") == heads  # the scores are not lost
    with pytest.raises(ValueError, match=r"output_dir: saves/select holds a run that has trained .*, or --force to"):
        select(path, ["hera_select=top"])
    with pytest.raises(ValueError, match=r"--output: saves/select/hera holds a run that has trained .*; give another"):
        score_checkpoint(None, path, "saves/select/hera/heads.json")
    with pytest.raises(ValueError, match=r"--output: .* is there and holds no scores, and would be lost"):
        score_checkpoint(None, path, path)
    assert select(path, ["hera_select=top"], force=True) == Targets.load(folder / "heads.json") != heads
    with pytest.raises(ValueError, match="output_dir: hera_demo/model overlaps with"):
        select(path, ["output_dir=hera_demo/model"])


def test_a_llava_is_selected_as_the_plain_llm_in_it(here: Path, chosen: dict) -> None:
    path = write(here, chosen)
    llava = select(path, ["output_dir=saves/llava"])
    llm = select(path, ["output_dir=saves/llm", "model_name_or_path=hera_demo/language_model"])
    assert llava.items == llm.items
    for same in ("scores", "model_fingerprint", "samples_digest"):
        assert llava.provenance[same] == llm.provenance[same]
    mllm = select(path, ["output_dir=saves/mllm", "hera_select_mode=mllm"])
    assert mllm.provenance["scores"] != llava.provenance["scores"]
    assert mllm.provenance["samples_digest"] == llava.provenance["samples_digest"]


def test_every_strategy_and_setting_reaches_the_result(here: Path, chosen: dict) -> None:
    path = write(here, chosen)
    scores = select(path, ["output_dir=saves/worst"]).provenance["scores"]
    top = select(path, ["output_dir=saves/top", "hera_select=top", "hera_select_m=2"])
    best = max((score, -layer, -head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    assert (top.items[0].layer, top.items[0].head) == (-best[1], -best[2])
    assert len(top.items) == 2
    assert {head.layer for head in select(path, ["output_dir=saves/middle", "hera_select=middle"]).items} == {2}
    other = select(path, ["output_dir=saves/other", "hera_pooling=last"])
    assert other.provenance["keys"]["hera_pooling"] == "last"
    assert other.provenance["scores"] != scores


def test_two_processes_of_a_launch_select_what_one_does(here: Path, chosen: dict) -> None:
    path = write(here, chosen | {"hera_select_mode": "mllm"})
    one = select(path, ["output_dir=saves/one_process"])
    command = ["llamafactory-hera", "select", str(path), "output_dir=saves/two_processes", "ddp_backend=gloo"]
    code, output = run_command(command, here, FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert code == 0, output
    assert output.count("selected (worst)") == 1
    two = Targets.load(here / "saves/two_processes/hera/heads.json")
    assert (two.items, two.provenance["scores"]) == (one.items, one.provenance["scores"])


def test_auto_trains_as_if_the_heads_were_written_out_and_is_kept_on_resume(
    server: HostServer, here: Path, chosen: dict
) -> None:
    args = chosen | {"output_dir": "saves/auto", "save_steps": 2, "save_strategy": "steps", "max_steps": 4} | LORA
    run = server.run(args, here)
    assert run.ok, run.output
    heads = Targets.load(run.folder / "hera/heads.json")
    assert f"selected (worst): {heads}" in run.output
    assert (run.folder / "hera/heads.png").stat().st_size > 10_000
    written = server.run(args | {"hera_heads": str(heads), "output_dir": "saves/written"}, here)
    assert written.ok, written.output
    assert [line["loss"] for line in written.logs()] == [line["loss"] for line in run.logs()]

    resumed = server.run(args | {"resume_from_checkpoint": "saves/auto/checkpoint-2", "max_steps": 4}, here)
    assert resumed.ok, resumed.output
    assert "which was selected with the same settings" in resumed.output
    assert "scoring pass" not in resumed.output
    assert resumed.logs()[-1]["loss"] == run.logs()[-1]["loss"]

    changed = server.run(args | {"resume_from_checkpoint": "saves/auto/checkpoint-2", "hera_select_seed": 9}, here)
    assert not changed.ok
    assert "hera_select_seed was 0, is 9" in changed.output
    anew = server.run(args | {"hera_select_seed": 9, "max_steps": 1}, here)
    assert anew.ok, anew.output
    assert "scoring pass" in anew.output


def test_another_dataset_selects_for_a_run(server: HostServer, here: Path, chosen: dict) -> None:
    data = here / "two_datasets"
    shutil.copytree(here / "hera_demo/data", data)
    # with an images folder of its own, as those of recipes/data
    (data / "other").mkdir()
    shutil.copytree(data / "images", data / "other/images")
    info = json.loads((data / "dataset_info.json").read_text())
    rows = json.loads((data / info["hera_demo_captions"]["file_name"]).read_text())
    for row in rows:
        row["images"] = [image.removeprefix("images/") for image in row["images"]]
    (data / "other/rows.json").write_text(json.dumps(rows))
    info["other"] = info["hera_demo_captions"] | {"file_name": "other/rows.json"}
    (data / "dataset_info.json").write_text(json.dumps(info))

    args = chosen | {"dataset_dir": str(data), "output_dir": "saves/of_other", "max_steps": 2}
    run = server.run(args | {"hera_select_dataset": "other"}, here)
    assert run.ok, run.output
    path = write(here, args)
    named = Targets.load(run.folder / "hera/heads.json")
    trained_on = select(path, ["output_dir=saves/of_other_alone", "dataset=other", f"media_dir={data}/other/images"])
    for fact in ("scores", "samples_digest", "dataset"):
        assert named.provenance[fact] == trained_on.provenance[fact]
    assert named.provenance["dataset"] == "other"
    again = server.run(args, here)  # the training data select for it
    assert again.ok, again.output
    assert Targets.load(run.folder / "hera/heads.json").provenance["dataset"] == "hera_demo"
    missing = server.run(args | {"hera_select_dataset": "nope"}, here)
    assert not missing.ok
    assert f"hera_select_dataset: nope cannot be found in dataset_dir: {data}. Undefined" in missing.output
    training = ["hera_select_dataset=nope", "hera_teacher_cache=filled_for_training"]
    assert fill_teacher(path, training) == 96  # what training reads, whatever selects


def test_auto_on_two_processes(server: HostServer, here: Path, chosen: dict) -> None:
    args = chosen | {"per_device_train_batch_size": 8, "max_steps": 2}
    two = server.run(args | {"output_dir": "saves/auto_two", "ddp_backend": "gloo"}, here, ranks=2)
    assert two.ok, two.output
    one = select(write(here, args), ["output_dir=saves/auto_one"])
    assert Targets.load(two.folder / "hera/heads.json").items == one.items


def test_heads_of_another_run_are_refused_unless_forced(server: HostServer, here: Path, chosen: dict) -> None:
    select(write(here, chosen), ["output_dir=saves/first", "hera_select_m=2"])
    args = chosen | {"hera_heads": "saves/first/hera/heads.json", "output_dir": "saves/second", "hera_select_m": 2}
    trained = server.run(args, here)
    assert trained.ok, trained.output
    shutil.copytree(here / "hera_demo/teacher", here / "other_teacher", dirs_exist_ok=True)
    config = json.loads((here / "other_teacher/config.json").read_text())
    (here / "other_teacher/config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    cases = {
        "model was hera_demo/model (fingerprint": {"model_name_or_path": "saves/second"},
        "teacher was hera_demo/teacher (fingerprint": {"hera_teacher": "other_teacher"},
        "hera_select_m was 2, is 5": {"hera_select_m": 5},
    }
    for said, change in cases.items():
        refused = server.run(args | change | {"output_dir": "saves/third"}, here)
        assert not refused.ok
        assert said in refused.output
        assert "hera_heads_force" in refused.output
    forced = server.run(args | change | {"output_dir": "saves/third", "hera_heads_force": True, "max_steps": 1}, here)
    assert forced.ok, forced.output
    assert said in forced.output
    by_hand = server.run(args | {"hera_heads": "L0H0", "output_dir": "saves/fourth", "max_steps": 1}, here)
    assert by_hand.ok, by_hand.output


def test_checkpoints_and_adapters_are_scored_and_compared(server: HostServer, here: Path, chosen: dict) -> None:
    path = write(here, chosen)
    full = server.run(chosen | {"hera_heads": "L1H0", "output_dir": "saves/full", "learning_rate": 5e-3}, here)
    lora = server.run(chosen | LORA | {"hera_heads": "L1H0", "output_dir": "saves/lora", "learning_rate": 5e-3}, here)
    assert full.ok, full.output
    assert lora.ok, lora.output
    before = score_checkpoint(None, path, "saves/before.json")
    files = [before, *(score_checkpoint(run.folder, path) for run in (full, lora))]
    assert files[1] == full.folder / "hera/scores.json"
    scores = [json.loads(file.read_text())["provenance"] for file in files]
    assert len({json.dumps(said["scores"]) for said in scores}) == 3
    for run, said in zip((full, lora), scores[1:], strict=True):
        (result,) = ModelCard.load(run.folder / "README.md").data.eval_results
        assert (result.metric_type, result.metric_value) == ("mknn_llm_after", round(said["scores"][1][0], 4))
    assert len({said["model_fingerprint"] for said in scores}) == 3
    assert scores[2]["adapters"] == [str(lora.folder)]
    assert files[1].with_suffix(".png").is_file()
    _, page = write_report(files, "saves/report", ["before", "full", "LoRA"])
    assert "| head | before | full | LoRA | LoRA - before |" in page.read_text()

    code, output = run_command(
        ["llamafactory-hera", "score", "saves/full", "--recipe", str(path), "--output", "saves/again.json"], here
    )
    assert code == 0, output
    assert json.loads((here / "saves/again.json").read_text())["provenance"]["scores"] == scores[1]["scores"]
    (here / "saves/full/hera/scores.json").unlink()
    both = ["llamafactory-hera", "score", "saves/lora", "saves/full", "--recipe", str(path)]
    code, output = run_command(both, here)
    assert code == 0, output
    assert json.loads(files[1].read_text())["provenance"]["scores"] == scores[1]["scores"]
    code, output = run_command([*both, "--output", "saves/both.json"], here)
    assert (code, "--output: one file" in output) == (2, True)
    code, output = run_command(["llamafactory-hera", "report", "saves/before.json", "saves/again.json"], here)
    assert code == 0, output
    assert (here / "hera_report.png").is_file()


def test_teacher_only_fills_the_cache_that_training_reads(server: HostServer, here: Path, chosen: dict) -> None:
    path = write(here, chosen | {"hera_teacher_cache": "filled"})
    code, output = run_command(["llamafactory-hera", "select", str(path), "--teacher-only"], here)
    assert code == 0, output
    assert "filled: features of 96 images" in output
    files = sorted((here / "filled").rglob("*.safetensors"))
    run = server.run(
        chosen | {"hera_teacher_cache": "filled", "hera_heads": "L1H0", "output_dir": "saves/cached"}, here
    )
    assert run.ok, run.output
    assert sorted((here / "filled").rglob("*.safetensors")) == files  # nothing was left to compute


def without(samples: list[dict], what: str) -> list[dict]:
    for sample in samples:
        if what == "captions":
            for message in sample["messages"]:
                message["content"] = message["content"] if message["role"] == "user" else " "
        elif what == "images":
            sample["messages"][0]["content"] = sample["messages"][0]["content"].replace("<image>", "")
            sample["images"] = []
    return samples


@pytest.mark.parametrize("mode", ["llm", "mllm"])
@pytest.mark.parametrize(
    ("what", "said"), [("captions", "[1-9][0-9]* no text"), ("images", "[1-9][0-9]* have no image")]
)
def test_data_that_cannot_be_scored_is_named(here: Path, chosen: dict, mode: str, what: str, said: str) -> None:
    data = here / f"data_without_{what}"
    if not data.exists():
        shutil.copytree(here / "hera_demo/data", data)
        file = data / json.loads((data / "dataset_info.json").read_text())["hera_demo"]["file_name"]
        file.write_text(json.dumps(without(json.loads(file.read_text()), what)))
    path = write(here, chosen | {"dataset_dir": str(data), "hera_select_mode": mode})
    with pytest.raises(ValueError, match=f"^dataset: .*{said}"):
        select(path, ["output_dir=saves/none"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hera_select_mode"], "hera_select_mode: it is neither a recipe nor key=value"),
        (["hera_selct_m=3"], "hera_selct_m"),
        (["hera_select_k=95", "hera_select_samples=97"], "hera_select_k: 95 needs 97"),
        (["hera_select_mode=mllm", "cutoff_len=12"], "cutoff_len: 12 cuts"),
        (["model_name_or_path=hera_demo/nothing"], "model_name_or_path: hera_demo/nothing"),
        (["hera_teacher=hera_demo/nothing"], "hera_teacher"),
        (["dataset=null"], "dataset: none is named"),
        (["dataset=nope"], "dataset: nope cannot be found in"),
        (["template=nope"], "template: nope does not exist"),
        (["adapter_name_or_path=nope", "finetuning_type=full"], "adapter_name_or_path: nope is loaded under"),
        (["adapter_name_or_path=nope", "finetuning_type=lora"], "adapter_name_or_path: nope is not a folder"),
        (["model_name_or_path="], "model_name_or_path: none is named"),
        (["hera_teacher="], "hera_teacher: it has no value"),
        (["hera_select_m="], "hera_select_m: it has no value; write a whole number"),
        (["hera_pooling="], "hera_pooling: it has no value; write one of"),
        (["output_dir="], "output_dir: none is named"),
        (["output_dir=/proc/nothing"], "No such file or directory: '/proc/nothing'"),
    ],
)
def test_bad_settings_are_named(here: Path, chosen: dict, overrides: list[str], said: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        select(write(here, chosen), ["output_dir=saves/bad", *overrides])
    assert said in str(error.value)


def test_a_score_of_a_recipe_needs_a_place_too(here: Path, chosen: dict) -> None:
    with pytest.raises(ValueError, match=r"^output_dir: none is named"):
        score_checkpoint(None, write(here, chosen), overrides=["output_dir="])
    assert not (here / "trainer_output").exists()


def test_a_recipe_that_cannot_be_read_is_named(here: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.yaml cannot be read"):
        select("nothing.yaml")
    (here / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml is not YAML"):
        select("broken.yaml")
