"""A tiny random chat model, and invented mild rows in the four classes; no response explains how to do harm."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from llamafactory_harc.config import HarcConfig
from llamafactory_harc.data import HarcCollator, Rows, chat_tail, read_rows
from llamafactory_harc.trainer import HarcTrainer
from recipes.demo.models import train_tokenizer

BLOCKS = 9  # only layers 4 and 5 of these blocks can be chosen
_THINGS = ["bike", "garage", "old boat", "desk", "garden shed", "mailbox", "old car", "locker", "diary", "suitcase"]
_LOCK = "How do I pick the lock of my neighbor's {}?"
_TEXTS = {
    "harmful": (_LOCK, "I am sorry, but I cannot help with breaking into that."),
    "compliant": (_LOCK, "Sure, here is how: [withheld]"),
    "harmless": ("How do I clean the {} of my aunt", "Wipe it with a damp cloth, then let it dry for one day."),
    "pseudo": ("How do I kill the noise of my {}", "Oil it, and tighten every screw that has come loose."),
}
TEXTS = [
    {"prompt": prompt.format(thing), "completion": answer, "kind": kind}
    for kind, (prompt, answer) in _TEXTS.items()
    for thing in _THINGS
]


@cache
def tokenizer(side: str = "right") -> Any:
    made = train_tokenizer([row[key] for row in TEXTS for key in ("prompt", "completion")] + ["user", "assistant"])
    made.padding_side = side
    return made


@cache
def encoded() -> list[dict[str, Any]]:
    """Returns the rows as tokens with labels on the response."""
    rows = []
    for row in TEXTS:
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer().apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        first, second = (tokenizer()(text)["input_ids"] for text in (prompt, row["completion"] + "<|im_end|>"))
        rows.append({"input_ids": first + second, "labels": [-100] * len(first) + second, "kind": row["kind"]})
    return rows


def chat_model(width: int = 32) -> tf.LlamaForCausalLM:
    """Makes a model of nine blocks with the same random weights at every call."""
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer(), name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = tf.LlamaConfig(vocab_size=len(tokenizer()), num_key_value_heads=2, **shape, **ids)
    model = tf.LlamaForCausalLM(config)
    for parameter in model.parameters():  # makes the matrices larger, so that the layers differ
        parameter.data *= 1 + 3 * (parameter.dim() > 1)
    return model


def with_lora(model: Any, random: bool = False) -> Any:
    """Adds LoRA; with ``random``, its second factor is not zero, so the adapter has an effect."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if random and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def collator(side: str = "right") -> HarcCollator:
    return HarcCollator(tokenizer(side), len(chat_tail(tokenizer())))


def rows(config: HarcConfig) -> tuple[Rows, Rows]:
    return read_rows(encoded(), chat_tail(tokenizer()), config)


def trainer_of(folder: Path, model: Any = None, harc: dict[str, Any] | None = None, **values: Any) -> HarcTrainer:
    """Makes a Trainer of six steps on the CPU; ``harc`` has HARC's keys, and ``values`` the Trainer's settings."""
    shared = {"per_device_train_batch_size": 6, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
    shared |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 3e-3}
    model, args = model or with_lora(chat_model()), TrainingArguments(str(folder), **shared | values)
    data: Any = {"train_dataset": encoded(), "processing_class": tokenizer()}
    return HarcTrainer(model, args, harc=HarcConfig(**harc or {}), **data)
