"""Fine-tunes a vision-language model with TRL's SFTTrainer and HeRA; by default a tiny one, on the demo's data.

    llamafactory-hera demo
    python recipes/trl/sft_vlm_hera.py

One of your own needs four things: a model with its processor, a teacher, the rows of `dataset`, and head names. With
`--heads auto` they are selected on your rows before training, and kept in `saves/trl_hera/hera/heads.json`.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from trl import SFTConfig

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.trl import HeraSFTTrainer


def dataset(folder: Path, file: str) -> Dataset:
    """One row a conversation: its last answer is learned, all before it is the prompt, and its image is shown."""
    rows = []
    for sample in json.loads((folder / file).read_text(encoding="utf-8")):
        turns = [turn | {"content": turn["content"].replace("<image>", "").strip()} for turn in sample["messages"]]
        images = [str(folder / image) for image in sample["images"]]
        rows.append({"prompt": turns[:-1], "completion": turns[-1:], "images": images})
    return Dataset.from_list(rows).cast_column("images", [Image()])


def main() -> None:
    """Trains, and saves the model with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hera_demo/model", help="folder or hub id")
    parser.add_argument("--teacher", default="hera_demo/teacher", help="folder or hub id of a vision model")
    parser.add_argument("--data", type=Path, default=Path("hera_demo/data"), help="folder of the conversations")
    parser.add_argument("--file", default="demo_train.json", help="its file with `messages` and `images`")
    parser.add_argument("--heads", default="auto", help="names (L13H12,L7H6), a heads.json, or auto")
    parser.add_argument("--weight", type=float, default=0.01, help="of the alignment loss")
    parser.add_argument("--memory", type=int, default=64, help="remembered samples to compare with")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output_dir", default="saves/trl_hera")
    given = parser.parse_args()

    trainer = HeraSFTTrainer(
        given.model,
        SFTConfig(
            given.output_dir,
            max_steps=given.max_steps,
            per_device_train_batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            max_length=None,  # nothing cuts off an image
            bf16=torch.cuda.is_available(),
            logging_steps=5,
            report_to="none",
        ),
        hera=HeraConfig(heads=given.heads, teacher=given.teacher, weight=given.weight, memory=given.memory),
        train_dataset=dataset(given.data, given.file),
        peft_config=LoraConfig(r=16, target_modules="all-linear", exclude_modules=["lm_head"]) if given.lora else None,
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()


if __name__ == "__main__":
    main()
