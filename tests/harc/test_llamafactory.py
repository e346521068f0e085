"""``stage: harc`` in the real LLaMA-Factory: its data, the command, engines with two processes, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llamafactory_harc.data import chat_tail
from llamafactory_hera.integrations.llamafactory.recipe import host_arguments
from tests.e2e.runner import write_recipe
from tests.e2e.test_engines import keys_of

from . import tiny

RECIPE: dict[str, Any] = {
    "stage": "harc", "do_train": True, "model_name_or_path": "model", "template": "qwen3_nothink", "dataset": "mixed",
    "dataset_dir": "data", "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj,down_proj",
    "per_device_train_batch_size": 12, "max_steps": 3, "logging_steps": 1, "learning_rate": 3e-3, "report_to": "none",
    "use_cpu": True, "seed": 1, "output_dir": "saves/run", "harc_refresh": 2,
    "overwrite_output_dir": True, "save_strategy": "no", "cutoff_len": 8,
}  # fmt: skip
ENV = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its rows, in one dataset with a ``kind`` column and in four named by kind."""
    place = tmp_path_factory.mktemp("harc")
    tiny.chat_model().save_pretrained(place / "model")
    tiny.tokenizer().save_pretrained(place / "model")
    mixed = [{"instruction": row["prompt"], "input": "", "output": row["completion"], **row} for row in tiny.TEXTS]
    files = {"mixed": mixed, "unanswered": [row | {"output": ""} for row in mixed]}
    for kind in ("harmful", "harmless", "pseudo", "compliant"):
        rows = [row for row in mixed if row["kind"] == kind]
        files[f"my_{kind}"] = [{key: value for key, value in row.items() if key != "kind"} for row in rows]
    (place / "data").mkdir()
    for name, rows in files.items():
        (place / f"data/{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in files}
    (place / "data/dataset_info.json").write_text(json.dumps(info))
    return place


def _samples(place: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> Any:
    from llamafactory_harc.llamafactory import KindSamples, checked

    monkeypatch.chdir(place)
    host = host_arguments(RECIPE | keys)
    host.model.enable_liger_kernel = keys.get("dataset") == "liger"  # the parser requires the package
    return KindSamples(host, checked(host))


def test_the_tail_and_rows_of_the_hosts_template_are_those_of_the_tokenizer(place, monkeypatch):
    samples = _samples(place, monkeypatch)
    named = _samples(place, monkeypatch, dataset="my_harmful,my_harmless,my_pseudo,my_compliant")
    assert samples.tail == chat_tail(tiny.tokenizer())
    expected = {(tuple(row["input_ids"]), row["kind"]) for row in tiny.encoded()}
    for each in (samples, named):  # the host also ends a turn with a line break
        assert {(tuple(row["input_ids"][:-1]), row["kind"]) for row in each.encoded()} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"finetuning_type": "full", "lora_target": "all"}, "finetuning_type: full trains no adapter"),
        ({"dataset": "liger"}, "enable_liger_kernel: True does not work with stage: harc"),
        ({"packing": True}, "packing: True does not work with stage: harc"),
        ({"val_size": 0.1}, "val_size: 0.1 does not work with stage: harc"),
        ({"dataset": "unanswered"}, r"row 0 .harmful. has no response"),
        ({"harc_column": "other"}, "harc_column: mixed.json has no `other` column"),
        ({"harc_margn": 0.3}, "harc_margn: no such key; did you mean harc_margin"),
    ],
)
def test_unsuitable_keys_and_data_are_refused_before_weights_load(place, monkeypatch, keys, message):
    with pytest.raises(ValueError, match=message):
        _samples(place, monkeypatch, **keys).encoded()


@pytest.mark.slow
def test_two_processes_and_engines_train_as_one_process(server, place):
    whole = server.run(RECIPE | {"output_dir": "saves/one"}, place, env=ENV).logs()
    assert len(whole) == 3
    files = {path.name for path in (place / "saves/one/harc").iterdir()}
    assert {"directions.safetensors", "directions.png", "harc.json", "state.safetensors", "run.json"} <= files
    assert (place / "saves/one/adapter_model.safetensors").is_file()
    assert "harc_kl" in (place / "saves/one/trainer_log.jsonl").read_text()
    for name in ("DDP", "zero2", "zero3"):
        keys: dict[str, Any] = {"per_device_train_batch_size": 6, "output_dir": f"saves/{name}", "ddp_backend": "gloo"}
        part = server.run(RECIPE | keys | keys_of(name, place), place, ranks=2, env=ENV).logs()
        for ours, theirs in zip(part, whole, strict=True):
            compared = {
                key: value for key, value in theirs.items() if key.startswith(("harc", "l")) and key != "learning_rate"
            }
            assert {key: ours[key] for key in compared} == pytest.approx(compared, rel=2e-4, abs=1e-5), name


@pytest.mark.slow
def test_the_command_writes_directions_that_a_run_uses(server, place):
    recipe = write_recipe(place / "recipe.yaml", RECIPE | {"output_dir": "saves/command"})
    code, output = server.command("harc-directions", recipe, "max_steps=1", cwd=place, **ENV)
    assert code == 0, output
    written = yaml.safe_load((place / "saves/command/harc/run.yaml").read_text())
    assert written == RECIPE | {
        "output_dir": "saves/command", "max_steps": 1, "harc_directions": "saves/command/harc/directions.safetensors"
    }  # fmt: skip
    found = load_file(place / "saves/command/harc/directions.safetensors")
    run = server.run(written | {"output_dir": "saves/used"}, place, env=ENV)
    assert run.ok, run.output
    state = load_file(run.folder / "harc/state.safetensors")
    assert torch.equal(
        state["base"], torch.stack([found[n] for n in ("harm", "refusal", "response_harm", "response_refusal")])
    )
