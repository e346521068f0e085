"""The plugin in ms-swift; ms-swift excludes our version of TRL, so ``make test-swift`` runs this file."""

import json
import re
import sys
from base64 import b64encode
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

pytest.importorskip("swift.trainers", reason="ms-swift is not installed here; make test-swift runs this file")

from swift.arguments import RLHFArguments, SftArguments
from swift.trainers import TrainerFactory
from swift.utils import import_external_file

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations import ms_swift
from tests.e2e.runner import ROOT, FileRuns, Run, check_selected
from tests.tiny_models import teacher_folder

WORDS = ["[UNK]", "What", "color", "?", "A", "dark", "light", "one", "system", "user", "assistant"]
#: ms-swift's template identifies Qwen's special tokens by their ids.
SPECIALS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
SPECIALS |= {"<|vision_end|>": 151653, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
VOCAB = 151660
N_ROWS = 24


def save_model(folder: Path) -> None:
    """Saves a tiny random Qwen2.5-VL with its processor."""
    words = {number: f"word{number}" for number in range(VOCAB)} | dict(enumerate(WORDS))
    words |= {number: token for token, number in SPECIALS.items()}
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in words.items()}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token) for token in SPECIALS])
    text = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
    vision |= {"out_hidden_size": 48, "fullatt_block_indexes": [0], "window_size": 56}
    ids = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ids |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    named = {f"{name}_token_id": SPECIALS[token] for name, token in ids.items()}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **named)
    torch.manual_seed(0)
    tf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    wrapped = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    images, videos = tf.Qwen2VLImageProcessor(), tf.Qwen2VLVideoProcessor()
    tf.Qwen2_5_VLProcessor(images, wrapped, videos, chat_template="{{ messages }}").save_pretrained(folder)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of a run of 4 steps with HeRA; the images are in a folder that only the environment names."""
    world = tmp_path_factory.mktemp("world")
    save_model(world / "model")
    rows = []
    for number in range(N_ROWS):
        pixels = torch.randint(0, 256, (9, 9, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((56, 56)).save(world / f"{number}.png")
        turns = ["<image>What color ?", "A dark one" if number % 2 else "light"]
        messages = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns, strict=True)]
        rows.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}))
    (world / "train.jsonl").write_text("\n".join(rows))
    (world / "hera.py").write_text("import llamafactory_hera.integrations.ms_swift\n")
    variables = {"HERA_HEADS": "L1H0,L1H3", "HERA_TEACHER": teacher_folder(), "HERA_K": 3, "HERA_WEIGHT": 0.1}
    return {
        "ENV": variables | {"ROOT_IMAGE_DIR": str(world), "MODELSCOPE_CACHE": str(world / "cache")},
        "external_plugins": [str(world / "hera.py")],
        "model": str(world / "model"),
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "check_model": False,  # otherwise, it asks a hub
        "dataset": [str(world / "train.jsonl")],
        "load_from_cache_file": False,
        "tuner_type": "full",
        "torch_dtype": "float32",
        "bf16": False,
        "freeze_vit": False,
        "freeze_aligner": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 2,
        "eval_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "use_cpu": True,
        "add_version": False,
        "output_dir": "saves",
    }


@pytest.fixture(scope="module")
def train(keys: dict[str, Any]) -> FileRuns:
    return FileRuns(keys, "swift.cli.main", "sft", "config.yaml")


@pytest.fixture(scope="module")
def run(train: FileRuns, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_the_command_trains_with_hera(run):
    assert "hera_loss" not in run.logs()[0]  # the memory fills
    line = run.logs()[2]
    assert line["hera_loss"] > 0
    assert line["loss"] == pytest.approx(line["lm_loss"] + 0.1 * line["hera_loss"], abs=1e-3)
    assert run.output.count("HeRA | heads: L1H0,L1H3") == 1
    assert "HeRA" in (run.folder / "README.md").read_text()  # ms-swift's model is its last checkpoint
    assert run.folder.name in (run.folder / "README.md").read_text()


@pytest.mark.slow
def test_auto_selects_on_the_rows_of_a_lora_run_and_the_run_resumes(keys, train, tmp_path):
    env = {"HERA_HEADS": "auto", "HERA_SELECT_M": 2, "HERA_SELECT_K": 5, "HERA_SELECT_SAMPLES": 20}
    env |= {"HERA_ACCUMULATE": "gradcache", "HERA_TEACHER_CACHE": str(tmp_path / "cache")}
    changes = {"ENV": keys["ENV"] | env, "tuner_type": "lora", "dataloader_num_workers": 1}
    changes["dataloader_persistent_workers"] = False  # with them, ms-swift's own resumed runs draw different dropout
    run = train(tmp_path / "run", **changes)
    check_selected(run, 2, 20)
    assert {"hera_loss", "hera_mknn"} <= run.logs()[-1].keys()
    train.check_resumed(run, tmp_path / "resumed", **changes)


def _arguments(keys: dict[str, Any], folder: Path, **changes: Any) -> SftArguments:
    given = {key: value for key, value in keys.items() if key not in ("ENV", "external_plugins")}
    kind = RLHFArguments if "rlhf_type" in changes else SftArguments
    return kind(**given | {"output_dir": str(folder), **changes})


REFUSED = {
    "packing": {"packing": True, "attn_impl": "flash_attn"},
    "padding_free": {"padding_free": True, "attn_impl": "flash_attn"},
    "sequence_parallel_size": {"sequence_parallel_size": 2},
    "streaming": {"streaming": True},
    "truncation_strategy": {"truncation_strategy": "split"},
    "tuner_backend": {"tuner_backend": "unsloth"},
    "task_type": {"task_type": "seq_cls", "num_labels": 2},
    "rlhf_type": {"rlhf_type": "dpo"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_before_the_model_is_loaded(keys, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: .* does not work with HeRA"):
        _arguments(keys, tmp_path, **REFUSED[name])


def test_a_mistyped_variable_stops_the_command_with_a_hint(keys, tmp_path, monkeypatch):
    _arguments(keys, tmp_path)
    monkeypatch.setenv("HERA_WEIHGT", "0.1")
    with pytest.raises(ValueError, match=r"hera_weihgt: no such key; did you mean hera_weight\?"):
        _arguments(keys, tmp_path)


def test_variables_take_precedence_over_the_file(tmp_path):
    file = tmp_path / "hera.yaml"
    file.write_text("hera_heads: [L1H0, L1H3]\nhera_weight: 0.5\nhera_k: 7\n")
    hera = ms_swift.read_keys({"HERA_CONFIG": str(file), "HERA_WEIGHT": "0.1", "HERA_DISABLE": "0", "PATH": "/bin"})
    assert (hera.heads, hera.weight, hera.k) == ("L1H0,L1H3", 0.1, 7)
    assert ms_swift.read_keys({}) == HeraConfig()


@pytest.mark.parametrize("text", [None, "weight: 0.1", "- hera_weight", "{"])
def test_a_file_that_is_missing_or_has_other_keys_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "hera.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"HERA_CONFIG: .*hera.yaml (cannot be read|must contain only)"):
        ms_swift.read_keys({"HERA_CONFIG": str(tmp_path / "hera.yaml")})


FORMS = {
    "a path under ROOT_IMAGE_DIR": lambda path, data: {"images": [path.name]},
    "bytes": lambda path, data: {"images": [{"bytes": data, "path": None}]},
    "a dictionary with a path": lambda path, data: {"images": [{"bytes": None, "path": str(path)}]},
    "base64": lambda path, data: {"images": [b64encode(data).decode()]},
    "a tag": lambda path, data: {"text": f"<img>{path}</img> What ?"},
    "a part of a message": lambda path, data: {"text": [{"type": "image", "image": str(path)}]},
    "a data URI": lambda path, data: {
        "text": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(data).decode()}"}}]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_sees_the_images_of_every_form_that_ms_swift_reads(tmp_path, monkeypatch, form):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    monkeypatch.setenv("ROOT_IMAGE_DIR", str(tmp_path))
    data = (tmp_path / "a.png").read_bytes()
    row = FORMS[form](tmp_path / "a.png", data)
    row["messages"] = [{"role": "user", "content": row.pop("text", "<image> What ?")}]
    encoded = ms_swift._encode(lambda row, return_length: {"length": 1}, row, return_length=True)
    assert encoded == {"length": 1, "hera_images": [data]}


def test_the_plugins_own_path_works_and_hides_no_package():
    before = list(sys.path)
    import_external_file(ms_swift.__file__)
    assert sys.path == before
    assert TrainerFactory.get_trainer_cls(SimpleNamespace(task_type="causal_lm")) is ms_swift.HeraSwiftTrainer


def test_the_configuration_in_the_docs_and_the_recipe_have_only_known_keys():
    page = re.search(r"```yaml\n(model:.*?)```", (ROOT / "docs/ms_swift.md").read_text(), re.DOTALL)[1]
    for text in (page, (ROOT / "recipes/ms_swift/qwen2_5_vl_7b_hera.yaml").read_text()):
        given = yaml.safe_load(text)
        ms_swift.read_keys({name: str(value) for name, value in given.pop("ENV").items()})
        assert not set(given) - {each.name for each in fields(SftArguments)}
