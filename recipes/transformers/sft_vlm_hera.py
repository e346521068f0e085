"""Supervised fine-tuning of a VLM with HeRA, using only transformers' Trainer.

    python recipes/demo                              # builds model, teacher and data in hera_demo/, about a minute
    python recipes/transformers/sft_vlm_hera.py      # selects heads, trains, writes saves/transformers_hera/
    torchrun --nproc-per-node 2 recipes/transformers/sft_vlm_hera.py --batch 8    # the same with two processes

The data are JSON in the sharegpt format: `messages` with role and content, where each `<image>` refers to the next
path in the `images` list. The paths are relative to the JSON file. The chat template must end each turn with the EOS
token.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import end_launch
from llamafactory_hera.integrations.transformers import HeraTrainer


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads rows with messages for a chat template and images as paths, which the collator opens."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["images"] = [str(path.parent / image) for image in row.get("images", [])]
        for message in row["messages"]:
            content = message["content"].replace("<image>\n", "<image>")  # the template adds the line break
            parts = [[{"type": "text", "text": text}] for text in content.split("<image>")]
            message["content"] = parts[0] + [part for text in parts[1:] for part in ({"type": "image"}, *text)]
    return rows


class Collator:
    """Makes a batch with the processor, and labels the assistant's turns."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        question = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
        asked = processor.apply_chat_template(question)
        begun = processor.apply_chat_template(question, add_generation_prompt=True)
        self.answer = processor.tokenizer.encode(begun[len(asked) :], add_special_tokens=False)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [self.processor.apply_chat_template(row["messages"]) for row in rows]
        images = [path for row in rows for path in row["images"]] or None
        # If the template writes the BOS token, the tokenizer must not add a second one.
        options = {"add_special_tokens": not texts[0].startswith(self.processor.tokenizer.bos_token or "\0")}
        options |= {"padding": True, "padding_side": "right", "return_tensors": "pt"}
        batch = self.processor(text=texts, images=images, **options)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            starts = (ids.unfold(0, len(self.answer), 1) == torch.tensor(self.answer)).all(dim=1).nonzero()
            for start in starts.flatten().tolist():
                start += len(self.answer)
                length = (ids[start:] == self.processor.tokenizer.eos_token_id).int().argmax() + 1
                labels[start : start + length] = ids[start : start + length]
        return dict(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hera_demo/model")
    parser.add_argument("--data", type=Path, default=Path("hera_demo/data/demo_train.json"))
    parser.add_argument("--output", default="saves/transformers_hera")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="samples per device")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lora", type=int, default=0, help="rank of the LoRA adapter; 0 trains all weights")
    parser.add_argument("--heads", default="auto", help="auto, names such as L13H12,L7H6, or the path of a heads.json")
    parser.add_argument("--teacher", default="hera_demo/teacher")
    parser.add_argument("--teacher-cache", default=None)
    parser.add_argument("--weight", type=float, default=0.1, help="weight of the HeRA loss; 0.01 in the paper")
    parser.add_argument("--memory", type=int, default=128, help="number of recent samples to add as candidates")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --output")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.model)
    model = AutoModelForImageTextToText.from_pretrained(options.model)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear"))
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        bf16=torch.cuda.is_available(),
        logging_steps=5,
        save_steps=max(1, options.steps // 2),
        remove_unused_columns=False,  # the collator makes the model inputs from these columns
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
    rows = read_rows(options.data)
    trainer = HeraTrainer(
        model, arguments, hera=hera, train_dataset=rows, data_collator=Collator(processor), processing_class=processor
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()


if __name__ == "__main__":
    main()
    end_launch()  # a process that exits with an open process group may abort
