"""The plugin in axolotl; axolotl pins other versions than ours, so ``make test-axolotl`` runs this file."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("axolotl", reason="axolotl is not installed here; make test-axolotl runs this file")

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # read during the import

from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.processing_strategies import ProcessingStrategy
from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator
from axolotl.utils.dict import DictDefault
from transformers import AutoProcessor

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.axolotl import HeraPlugin, _images_of
from recipes.demo.build import build_demo
from tests.e2e.runner import ROOT, FileRuns, Run, check_selected

PLUGIN = "llamafactory_hera.integrations.axolotl.HeraPlugin"
MARKS = [{"role": role, "start": f"<|im_start|>{role}\n", "end": "<|im_end|>"} for role in ("user", "assistant")]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a file that trains the demo for 4 steps with HeRA."""
    demo = build_demo(tmp_path_factory.mktemp("world") / "hera_demo", size="test")
    rows = json.loads((demo["data"] / "demo_train.json").read_text())
    for row in rows:
        row["images"] = [str(demo["data"] / image) for image in row["images"]]
        for turn in row["messages"]:
            turn["content"] = turn["content"].replace("<image>", "").lstrip("\n")
    train = demo["root"] / "train.jsonl"
    train.write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "base_model": str(demo["model"]),
        "processor_type": "AutoProcessor",
        "plugins": [PLUGIN],
        "hera_heads": ["L1H0", "L1H3", "L2H5", "L3H2", "L3H7"],
        "hera_teacher": str(demo["teacher"]),
        "hera_k": 3,
        "datasets": [{"path": str(train), "ds_type": "json", "type": "chat_template"}],
        "chat_template": "tokenizer_default",
        "role_boundaries": MARKS,
        "sequence_len": 512,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "logging_steps": 1,
        "seed": 0,
        "bf16": False,
        "output_dir": "saves",
    }


@pytest.fixture(autouse=True)
def no_plugins() -> Iterator[None]:
    """Clears the plugins, which axolotl keeps until the process ends."""
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@pytest.fixture(scope="module")
def train(keys: dict[str, Any]) -> FileRuns:
    return FileRuns(keys, "axolotl.cli.main", "train", "config.yaml", "--launcher", "python")


@pytest.fixture(scope="module")
def run(train: FileRuns, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_the_command_trains_with_hera(run):
    second = run.logs()[1]  # the first line's hera_loss omits the first micro-batch, when the memory was empty
    assert second["hera_loss"] > 0
    assert second["loss"] == pytest.approx(second["lm_loss"] + 0.01 * second["hera_loss"], abs=1e-4)
    assert run.output.count("HeRA | heads: L1H0,L1H3,L2H5,L3H2,L3H7") == 1  # axolotl does not hide it
    saves = run.folder.parent
    assert json.loads((saves / "hera/heads.json").read_text())
    assert "HeRA" in (saves / "README.md").read_text().partition("</details>")[2]


@pytest.mark.slow
def test_auto_selects_on_the_rows_of_the_run(train, tmp_path):
    auto = {"hera_heads": "auto", "hera_select_m": 2, "hera_select_k": 5, "hera_select_samples": 48}
    check_selected(train(tmp_path, **auto, max_steps=1), 2, 48)


@pytest.mark.slow
def test_a_resumed_run_logs_the_values_of_an_uninterrupted_one(run, train, tmp_path):
    train.check_resumed(run, tmp_path, tolerance=1e-4)


def test_keys_that_hera_needs_are_set(keys):
    cfg = load_cfg(DictDefault(keys | {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}))
    assert (cfg.remove_unused_columns, cfg.skip_prepare_dataset, cfg.lora_o_kernel) == (False, True, False)
    assert (cfg.hera_heads, cfg.hera_weight) == ("L1H0,L1H3,L2H5,L3H2,L3H7", 0.01)


REFUSED = {
    **dict.fromkeys(("sample_packing", "reward_model", "process_reward_model", "lora_o_kernel", "fp8"), True),
    **dict.fromkeys(("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"), 2),
    **{"remove_unused_columns": True, "skip_prepare_dataset": False, "batch_flattening": "auto", "rl": "dpo"},
    **{"pretraining_dataset": "text.jsonl", "trainer_cls": "my.Trainer", "hera_select_dataset": "captions"},
    **{"activation_offloading": "legacy", "context_parallel": {"size": 2}, "diffusion_lm": {"loss": "elbo"}},
}
WORDS = {
    "hera_head": ("L1H0", "hera_head: no such key; did you mean hera_heads"),
    "processor_type": (None, "processor_type: it is not set.* set it to AutoProcessor"),
    "train_on_inputs": (True, "train_on_inputs: true labels the prompt.* remove"),
}


@pytest.mark.parametrize("key", REFUSED | WORDS)
def test_bad_settings_are_refused_before_anything_is_loaded(keys, key):
    value = REFUSED.get(key)
    value, words = WORDS.get(key, (value, f"{key}: {value} does not work with HeRA"))
    with pytest.raises(ValueError, match=words):
        load_cfg(DictDefault(keys | {"base_model": "not there", "adapter": "lora", key: value}))


@pytest.mark.parametrize("order", [1, -1], ids=["before", "after"])
def test_another_plugins_trainer_is_refused_before_the_model_is_loaded(keys, order):
    plugins = ["axolotl.integrations.kd.KDPlugin", PLUGIN][::order]
    cfg = load_cfg(DictDefault(keys | {"plugins": plugins, "kd_trainer": True}))
    with pytest.raises(ValueError, match=r"plugins: axolotl.*KDPlugin also supplies a trainer, .* remove axolotl"):
        PluginManager.get_instance().pre_model_load(cfg)


def test_labels_that_cover_the_prompt_are_refused_for_answer_pooling(keys):
    processor = AutoProcessor.from_pretrained(keys["base_model"])
    collators = [
        MultiModalChatDataCollator(processor.tokenizer, ProcessingStrategy(processor, role_boundaries_override=marks))
        for marks in (MARKS, None)
    ]
    trainer, hera = HeraPlugin().get_trainer_cls(load_cfg(DictDefault(keys))), HeraConfig(heads="L1H0")
    for collator in collators:
        words = r"hera_pooling: answer .* set role_boundaries"
        with nullcontext() if collator is collators[0] else pytest.raises(ValueError, match=words):
            trainer.check_collator(SimpleNamespace(data_collator=collator), hera)


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"images": ["a.png", "b.png"], "messages": []}, ["a.png"]),  # axolotl shows only the first
        ({"image": ["a.png"], "images": None, "messages": []}, ["a.png"]),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": p} for p in "ab"]}]}, ["a", "b"]),
        ({"chat": [{"role": "user", "content": [{"type": "image", "url": "a"}]}], "messages": None}, ["a"]),
        ({"messages": [{"role": "user", "content": "no image"}]}, []),
    ],
)
def test_the_teacher_sees_the_images_that_axolotl_shows_the_model(row, images):
    assert _images_of(("chat",), row) == images


def test_the_configuration_in_the_docs_has_only_known_keys():
    page = (ROOT / "docs/axolotl.md").read_text()
    cfg = DictDefault(yaml.safe_load(re.search(r"```yaml\n(base_model.*?)```", page, re.DOTALL)[1]))
    PluginManager.get_instance().register(PLUGIN)
    _, schema = merge_input_args()
    assert not set(cfg) - set(schema.model_fields)
    PluginManager.get_instance().plugins[PLUGIN].register(cfg)
    schema(**cfg.to_dict())
