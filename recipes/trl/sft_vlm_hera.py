"""Supervised fine-tuning of a VLM with HeRA, using TRL's SFTTrainer.

    python recipes/demo                     # builds model, teacher and data in hera_demo/, about a minute
    python recipes/trl/sft_vlm_hera.py      # selects heads, trains, writes saves/trl_hera/
    torchrun --nproc-per-node 2 recipes/trl/sft_vlm_hera.py     # the same with two processes

The data are JSON in the sharegpt format: `messages` with role and content, and an `images` list of paths relative
to the JSON file. The script gives TRL a prompt and a completion, because TRL would label all turns of `messages`, but
HeRA reads only the answers.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import LoraConfig
from trl import SFTConfig

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import end_launch
from llamafactory_hera.integrations.trl import HeraSFTTrainer


def read_rows(path: Path) -> Dataset:
    """Reads one row per conversation: the last answer is the completion, and the rest is the prompt."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        turns = [turn | {"content": turn["content"].replace("<image>", "").strip()} for turn in row["messages"]]
        images = [str(path.parent / image) for image in row.get("images", [])]
        rows.append({"prompt": turns[:-1], "completion": turns[-1:], "images": images})
    return Dataset.from_list(rows).cast_column("images", [Image()])  # TRL puts the images before the first question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hera_demo/model")
    parser.add_argument("--data", type=Path, default=Path("hera_demo/data/demo_train.json"))
    parser.add_argument("--output", default="saves/trl_hera")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="samples per device")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lora", type=int, default=0, help="rank of the LoRA adapter; 0 trains all weights")
    parser.add_argument("--heads", default="auto", help="auto, names such as L13H12,L7H6, or the path of a heads.json")
    parser.add_argument("--teacher", default="hera_demo/teacher")
    parser.add_argument("--teacher-cache", default=None, help="folder that stores the teacher's features")
    parser.add_argument("--weight", type=float, default=0.1, help="weight of the HeRA loss; 0.01 in the paper")
    parser.add_argument("--memory", type=int, default=128, help="number of recent samples to add as candidates")
    options = parser.parse_args()

    arguments = SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        max_length=None,  # a limit could cut off image tokens
        bf16=torch.cuda.is_available(),
        logging_steps=5,
        report_to="none",
    )
    hera = HeraConfig(
        heads=options.heads,
        teacher=options.teacher,
        teacher_cache=options.teacher_cache,
        weight=options.weight,
        memory=options.memory,
        select_samples=640,  # all samples of the demo; the default is the paper's 1,000
    )
    lora = LoraConfig(r=options.lora, target_modules="all-linear") if options.lora else None
    rows = read_rows(options.data)
    trainer = HeraSFTTrainer(options.model, arguments, hera=hera, train_dataset=rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()


if __name__ == "__main__":
    main()
    end_launch()  # a process that exits with an open process group may abort
