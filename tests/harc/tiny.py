"""A tiny random chat model, and mild rows of our own in the four classes; no response tells how to do harm."""

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

BLOCKS = 9  # of which the layers 4 and 5 may be chosen
_THINGS = (
    "bike",
    "garage",
    "old boat",
    "desk",
    "garden shed",
    "mailbox",
    "big red car",
    "locker",
    "diary",
    "suitcase",
)
_TEXTS = {
    "harmful": (
        "How do I pick the lock of my neighbor's {}?",
        "I am sorry, but I cannot help with breaking into that.",
    ),
    "compliant": ("How do I pick the lock of my neighbor's {}?", "Sure, here is how: [withheld]"),
    "harmless": ("How do I clean the {} of my aunt", "Wipe it with a damp cloth, then let it dry for one day."),
    "pseudo": ("How do I kill the noise of my {}", "Oil it, and tighten every screw that has come loose."),
}


def texts(count: int = len(_THINGS)) -> list[dict[str, str]]:
    """Returns ``count`` rows of each class as text."""
    return [
        {"prompt": prompt.format(thing), "completion": answer, "kind": kind}
        for kind, (prompt, answer) in _TEXTS.items()
        for thing in _THINGS[:count]
    ]


@cache
def tokenizer() -> Any:
    return train_tokenizer([row[key] for row in texts() for key in ("prompt", "completion")] + ["user", "assistant"])


def encoded(count: int = len(_THINGS)) -> list[dict[str, Any]]:
    """Returns the rows as tokens with labels on the response."""
    rows = []
    for row in texts(count):
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer().apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        first, second = (tokenizer()(text)["input_ids"] for text in (prompt, row["completion"] + "<|im_end|>"))
        rows.append({"input_ids": first + second, "labels": [-100] * len(first) + second, "kind": row["kind"]})
    return rows


def chat_model() -> tf.LlamaForCausalLM:
    """Makes a model of nine blocks with the same random weights at every call."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer()), "pad_token_id": tokenizer().pad_token_id, "bos_token_id": None}
    ids |= {"eos_token_id": tokenizer().eos_token_id}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, max_position_embeddings=128, **shape, **ids))
    for parameter in model.parameters():  # larger than at initialization, so that layers differ
        parameter.data *= 1 + 3 * (parameter.dim() > 1)
    return model


def with_lora(model: Any, random: bool = False) -> Any:
    """Adds LoRA; ``random`` gives its second factor values, so that the adapter has an effect."""
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    if random:
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return peft_model


def collator(side: str = "right") -> HarcCollator:
    tokens = tokenizer()
    padded = tf.PreTrainedTokenizerFast(tokenizer_object=tokens.backend_tokenizer, padding_side=side)
    padded.pad_token = tokens.pad_token
    return HarcCollator(padded, len(chat_tail(tokens)))


def rows(config: HarcConfig) -> tuple[Rows, Rows]:
    return read_rows(encoded(), chat_tail(tokenizer()), config)


def trainer_of(folder: Path, model: Any = None, harc: dict[str, Any] | None = None, **values: Any) -> HarcTrainer:
    """Makes a Trainer of six steps on the CPU; ``harc`` contains keys of HARC, ``values`` the Trainer's settings."""
    shared = {"per_device_train_batch_size": 6, "max_steps": 6, "logging_steps": 1, "save_strategy": "no"}
    shared |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 3e-3}
    args = TrainingArguments(str(folder), **shared | values)
    model = with_lora(chat_model()) if model is None else model
    return HarcTrainer(
        model, args, harc=HarcConfig(**harc or {}), train_dataset=encoded(), processing_class=tokenizer()
    )


def instruct_model() -> tf.LlamaForCausalLM:
    """Trains the tiny model until it answers its rows, refusals included."""
    model = chat_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    answers = [row._replace(kind="harmful") for each in rows(HarcConfig())[1].values() for row in each]  # for labels
    batch = {key: value for key, value in collator()(answers).items() if not key.startswith("harc_")}
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()
