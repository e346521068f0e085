"""HeRA in TRL's SFTTrainer: the options that work, with the right gradient, and those that are refused.

The tests run with TRL 0.18 or newer, and skip features that a version does not have.
"""

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import Tensor, nn

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
datasets = pytest.importorskip("datasets")

from peft import LoraConfig  # noqa: E402

from llamafactory_hera.config import HeraConfig  # noqa: E402
from llamafactory_hera.heads.tokens import token_mask  # noqa: E402
from llamafactory_hera.integrations.trl import HeraSFTTrainer  # noqa: E402
from recipes.demo import models  # noqa: E402
from tests.integrations.gradients import check_term, token_mean  # noqa: E402
from tests.tiny_models import noise_images, teacher_folder  # noqa: E402

TRL, TRANSFORMERS = Version(trl.__version__), Version(tf.__version__)
ROOT = Path(__file__).parents[2]
BATCH = 4
QUESTION = "What does it show?"
ANSWERS = ["a red disc", "two blue rings and a star", "nothing", "a photograph of a cat", "five", "6"]
#: The template of the demo with marks around the assistant's turns.
_CONTENT = models.CHAT_TEMPLATE[
    models.CHAT_TEMPLATE.index("{%- if message") : models.CHAT_TEMPLATE.index("{%- endfor -%}{%- if add_")
]
MARKED = models.CHAT_TEMPLATE.replace(
    _CONTENT,
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}" + _CONTENT + "{%- endgeneration -%}"
    "{%- else -%}" + _CONTENT + "{%- endif -%}",
)


# -- a model, and data in the formats that TRL reads -----------------------------------------------------------------


@cache
def processor() -> Any:
    tokenizer = models.train_tokenizer([QUESTION, "user", "assistant", *ANSWERS])
    settings = {"patch_size": models.PATCH, "vision_feature_select_strategy": "full"}
    images = tf.SiglipImageProcessor(size={"height": models.SIDE, "width": models.SIDE})
    return tf.LlavaProcessor(images, tokenizer, chat_template=models.CHAT_TEMPLATE, **settings)


def llava() -> nn.Module:
    """Makes a model of the demo's architecture with the same random weights at every call."""
    torch.manual_seed(0)
    shape = {"image_size": models.SIDE, "patch_size": models.PATCH, "hidden_size": 64, "intermediate_size": 128}
    tower = tf.SiglipVisionModel(tf.SiglipVisionConfig(num_hidden_layers=2, num_attention_heads=4, **shape))
    tokenizer = processor().tokenizer
    return models.assemble_llava(models.new_language_model(tokenizer), tower, tokenizer)[0]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


#: Format -> the text columns of a row.
FORMATS: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt and completion": lambda answer: {
        "prompt": [turn("user", QUESTION)],
        "completion": [turn("assistant", answer)],
    },
    "messages": lambda answer: {"messages": [turn("user", QUESTION), turn("assistant", answer)]},
}


def dataset(form: str, n: int = BATCH, column: str = "images") -> Any:
    """Makes a dataset whose rows have one image each."""
    rows = []
    for number, image in enumerate(noise_images(n, (9, 9))):
        answer = ANSWERS[number % len(ANSWERS)]
        rows.append({**FORMATS[form](answer), column: image if column == "image" else [image]})
    features = datasets.Image() if column == "image" else [datasets.Image()]
    return datasets.Dataset.from_list(rows).cast_column(column, features)


def custom_collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A custom collator: it applies the chat template and labels the answer and the end of its turn."""
    user_turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    answers = [row["completion"][0]["content"] for row in rows]
    texts = [processor().apply_chat_template([user_turn, turn("assistant", answer)]) for answer in answers]
    batch = processor()(images=[row["images"] for row in rows], text=texts, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for row, answer in enumerate(answers):
        end, n = int(batch["attention_mask"][row].sum()), len(processor().tokenizer(f"{answer}<|im_end|>\n").input_ids)
        labels[row, end - n : end] = batch["input_ids"][row, end - n : end]
    return {**batch, "labels": labels}


def trainer_of(folder: Path, case: "Case", weight: float = 0.5, **values: Any) -> HeraSFTTrainer:
    shared = {"per_device_train_batch_size": BATCH, "max_steps": 1, "learning_rate": 3e-3, "logging_steps": 1}
    shared |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    shared |= {"max_length": None, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    keys = {"heads": "L1H0,L3H2", "teacher": teacher_folder(), "k": 2, "weight": weight, "memory": 0, **case.hera}
    processing = processor()
    if case.options.get("assistant_only_loss"):
        processing = tf.LlavaProcessor(processing.image_processor, processing.tokenizer, chat_template=MARKED)
        processing.patch_size, processing.vision_feature_select_strategy = models.PATCH, "full"
    arguments = {"processing_class": processing, "train_dataset": case.data(), **case.arguments()}
    config = trl.SFTConfig(str(folder), **{**shared, **case.options, **values})
    return HeraSFTTrainer(
        llava(), config, hera=HeraConfig.from_keys({f"hera_{k}": v for k, v in keys.items()}), **arguments
    )


# -- options that work, and options that are refused -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Options of TRL, and a part of the refusal's message (empty if the options work)."""

    name: str
    words: str = ""
    since: str = "0.22"  # older versions read no images
    until: str = "99"
    form: str = "prompt and completion"
    column: str = "images"
    streamed: bool = False
    steps: int = 1  # micro-batches per optimizer step
    options: dict[str, Any] = field(default_factory=dict)
    hera: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[[], dict[str, Any]] = dict
    transformers: str = "0"

    def data(self) -> Any:
        rows = dataset(self.form, self.steps * BATCH, self.column)
        return rows.to_iterable_dataset() if self.streamed else rows

    def skip(self) -> None:
        """Skips the test if this version of TRL does not support the case even without HeRA."""
        if not Version(self.since) <= TRL < Version(self.until):
            pytest.skip(f"{self.name}: needs TRL {self.since} or later, before {self.until}")
        if Version(self.transformers) > TRANSFORMERS:
            pytest.skip(f"{self.name}: TRL needs transformers {self.transformers} for this case")


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])}


def elsewhere() -> dict[str, Any]:
    return {"images_of": lambda row: row["picture"], "processing_class": processor().tokenizer}


NLL = {"loss_type": "nll"}
TWO = {"gradient_accumulation_steps": 2}
CASES = [
    Case("prompt and completion"),
    Case("messages, the text pooled", form="messages", hera={"pooling": "text"}),
    Case("messages, all pooled", form="messages", hera={"pooling": "mean"}),
    Case(
        "messages, assistant_only_loss",
        since="1.15",
        transformers="5.18",
        form="messages",
        options={"assistant_only_loss": True},
    ),
    Case("an `image` column", since="0.29", column="image"),
    Case(
        "a custom collator",
        since="0.18",
        options={"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
        arguments=lambda: {"data_collator": custom_collate},
    ),
    Case("chunked loss", since="1.4", options={"loss_type": "chunked_nll"}),
    Case("plain loss", options=NLL),
    Case("dft loss", options={"loss_type": "dft"}),
    Case("label smoothing", options={**NLL, "label_smoothing_factor": 0.1}),
    Case("a custom loss function", options=NLL, arguments=lambda: {"compute_loss_func": token_mean}),
    Case("a stream", streamed=True),
    Case("columns kept", options={"remove_unused_columns": False}),
    Case("no checkpointing", options={"gradient_checkpointing": False}),
    Case("re-entrant checkpointing", options={"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    Case("selective checkpointing", since="1.15", options={"gradient_checkpointing_kwargs": {"selective": True}}),
    Case("accumulation", steps=2, options=TWO),
    Case("gradient caching", steps=2, options=TWO, hera={"accumulate": "gradcache"}),
    Case(
        "accumulation, a custom loss", steps=2, options=TWO | NLL, arguments=lambda: {"compute_loss_func": token_mean}
    ),
    Case("peft_config", arguments=lora),
    Case("packing", "packing: True puts several samples into one row", since="0.18", options={"packing": True}),
    Case("padding_free", "padding_free: True puts several samples", since="0.18", options={"padding_free": True}),
    Case("messages", "averages over the tokens with a label, but TRL also labels the prompt", form="messages"),
    Case("the prompt learned, too", "without completion_only_loss=False", options={"completion_only_loss": False}),
    Case("images where TRL does not look", "TRL treats it as text", "0.18", column="picture", arguments=elsewhere),
]


@pytest.mark.parametrize("case", [case for case in CASES if not case.words], ids=lambda case: case.name)
def test_working_options_add_the_gradient_of_the_term_and_nothing_else(tmp_path, case):
    case.skip()
    together = case.hera.get("accumulate") == "gradcache"
    check_term(lambda weight: trainer_of(tmp_path, case, weight), together, 3e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.words], ids=lambda case: case.name)
def test_other_options_are_refused_with_reason_and_remedy(tmp_path, case):
    case.skip()
    with pytest.raises(ValueError, match=case.words):
        trainer_of(tmp_path, case)


# -- answers ---------------------------------------------------------------------------------------------------------

NAMED = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "name", ["prompt and completion", "messages, assistant_only_loss", "messages, the text pooled"]
)
def test_answers_are_the_turns_of_the_assistant(tmp_path, name):
    NAMED[name].skip()
    trainer = trainer_of(tmp_path, NAMED[name])
    batch = next(iter(trainer.get_train_dataloader()))
    image = trainer.model.config.image_token_id
    read = token_mask("answer", batch["input_ids"], batch["attention_mask"], batch["labels"], [image])
    texts = [processor().tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], read, strict=True)]
    if name == "messages, the text pooled":  # TRL also labels image tokens, which are not part of the answer
        assert (batch["labels"] == image).sum() == BATCH * 16
        assert not any("<image>" in text for text in texts)
    else:
        assert [text.rstrip("\n") for text in texts] == [f"{answer}<|im_end|>" for answer in ANSWERS[:BATCH]]


def test_heads_are_not_selected_on_data_that_is_refused(tmp_path):
    NAMED["messages"].skip()
    auto = {"heads": "auto", "select_samples": 12, "select_k": 4, "select_m": 2, "memory": 4}
    with pytest.raises(ValueError, match="TRL also labels the prompt"):
        trainer_of(tmp_path, Case("", form="messages", hera=auto, steps=4))
    assert not (tmp_path / "hera").exists()
    trainer = trainer_of(tmp_path, Case("", hera=auto, steps=4))
    assert len(trainer.aligner.targets.items) == 2
    assert json.loads((tmp_path / "hera/heads.json").read_text())["heads"] == list(trainer.aligner.targets.names)


# -- a run -----------------------------------------------------------------------------------------------------------


def test_the_code_of_the_docs_runs(tmp_path, monkeypatch):
    NAMED["prompt and completion"].skip()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/trl.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook/dinov2-large").symlink_to(teacher_folder())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, use_cpu=True, bf16=False, report_to="none"))
    llava().save_pretrained("model")
    processor().save_pretrained("model")
    names = {"model": "model", "dataset": dataset("prompt and completion", 16)}
    exec(code, names)
    assert all("lm_loss" in line for line in names["trainer"].state.log_history if "loss" in line)


@pytest.mark.slow
def test_the_shipped_script_trains_the_demo(tmp_path, copy_demo):
    NAMED["prompt and completion"].skip()
    code = f"""
        import runpy, sys
        sys.argv = ["sft_vlm_hera.py", "--steps", "5", "--lora", "4"]
        runpy.run_path({str(ROOT / "recipes/trl/sft_vlm_hera.py")!r}, run_name="__main__")
        print([name for name in sys.modules if name.split(".")[0] in ("llamafactory", "axolotl")])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=copy_demo(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"  # no other host is imported
    saved = tmp_path / "saves/trl_hera"
    assert "## Alignment with a vision encoder" in (saved / "README.md").read_text()
    content = json.loads((saved / "hera/card.json").read_text())
    assert content["steps"] == 5
    assert content["heads"] == json.loads((saved / "hera/heads.json").read_text())["heads"]
