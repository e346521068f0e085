"""One run: stage 1, stage 2, answers, MKNN of all heads, and what it cost; through transformers' Trainer."""

import math
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from llamafactory_hera.config import HeraConfig, Mode
from llamafactory_hera.demo.models import IMAGE
from llamafactory_hera.demo.scenes import GRID
from llamafactory_hera.heads.pooling import IGNORE_INDEX
from llamafactory_hera.integrations.transformers import HeraTrainer
from parts import CACHE, TEACHER, features_of, head_scores, load_llava, shown
from settings import METHODS, PAPER_WEIGHT, Method, Settings
from world import CATEGORIES, END, Sample, World, asked

_ANSWERED = 256  # questions a forward pass


class Encoder:
    """Samples as a model takes them; a callable from encoded samples to a batch."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        self._pad = tokenizer.pad_token_id
        self._image = [tokenizer.convert_tokens_to_ids(IMAGE)] * GRID**2
        self._ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Tokens, labels on the answer, the picture and its pixels; a caption follows its picture at once."""
        pixels = self._processor.image_processor(shown(samples), return_tensors="pt")["pixel_values"]
        rows = []
        for sample, pixel_values in zip(samples, pixels, strict=True):
            answer = self._ids(sample.answer + END)
            ids = [*self._image, *self._ids(asked(sample.question)), *answer]
            labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
            rows.append({"input_ids": ids, "labels": labels, "images": [sample.image], "pixel_values": pixel_values})
        return rows

    def captions(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Captions alone."""
        rows = [self._ids(sample.answer) for sample in samples]
        return [{"input_ids": ids, "labels": ids} for ids in rows]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_sequence(ids, True, self._pad),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
        }
        if "pixel_values" in rows[0]:
            batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
        return batch

    def batches(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """All rows in order, many at once."""
        for start in range(0, len(rows), _ANSWERED):
            yield self(rows[start : start + _ANSWERED])


def run(
    root: Path,
    world: World,
    settings: Settings,
    name: str,
    seed: int,
    weight: float | None,
    heads: dict[str, list[str]],
    questions: dict[str, list[Sample]],
) -> dict[str, Any]:
    """Trains a method's model and measures it.

    Args:
        root: The study's folder.
        world: What is shown.
        settings: Amounts.
        name: One of ``METHODS``.
        seed: Whose LLaVA is trained, in whose order of samples.
        weight: The chosen weight; None before it is chosen.
        heads: Names of heads by strategy.
        questions: What is asked afterwards, by set.

    Returns:
        ``accuracy`` by set and category, ``mknn`` by mode, layer and head, and ``cost``.
    """
    torch.set_num_threads(1)
    method, (model, processor) = METHODS[name], load_llava(root, seed)
    encoder = Encoder(processor)
    projector = model.get_submodule("model.multi_modal_projector")
    cost: dict[str, float] = {}
    for stage, samples, rate in ((1, world.captions, settings.stage1_rate), (2, world.train, settings.stage2_rate)):
        model.requires_grad_(stage == 2)
        model.get_submodule("model.vision_tower").requires_grad_(False)
        projector.requires_grad_(True)
        steps = settings.stage1_steps if stage == 1 else settings.stage2_steps
        arguments = TrainingArguments(
            str(root / f"runs/{name}-{seed}"),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * steps),
            seed=seed,
            use_cpu=True,
            logging_steps=max(1, steps // 20),
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        torch.manual_seed(seed)
        common = {"train_dataset": encoder.encode(samples), "data_collator": encoder, "processing_class": processor}
        hera = None if stage not in method.stages else hera_config(root, settings, method, weight, heads)
        trainer = (
            Trainer(model, arguments, **common) if hera is None else HeraTrainer(model, arguments, hera=hera, **common)
        )
        started = time.process_time()
        trainer.train()
        cost[f"stage{stage}_cpu_s"] = time.process_time() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cost["process_peak_mib"] = usage.ru_maxrss / 1024
    return {
        "accuracy": {kind: answer_all(model, encoder, asked) for kind, asked in questions.items()},
        "mknn": measure(root, model, encoder, world.scored),
        "cost": cost,
    }


def hera_config(
    root: Path, settings: Settings, method: Method, weight: float | None, heads: dict[str, list[str]]
) -> HeraConfig | None:
    if method.keys is None:
        return None
    keys = {"teacher": str(root / TEACHER), "k": settings.neighbours, **method.keys}
    if keys.get("objective", "contrastive") == "contrastive":
        keys |= {"memory": settings.memory}
    if keys.get("objective", "contrastive") in (
        "contrastive",
        "cka",
    ):  # the cache holds what a picture shows as a whole
        keys["teacher_cache"] = str(root / CACHE)
    if method.heads is not None:
        keys["heads"] = ",".join(heads[method.heads])
    keys["weight"] = {"paper": PAPER_WEIGHT, "chosen": weight}.get(method.weight, method.weight)
    return HeraConfig(**keys)


def measure(
    root: Path, model: Any, encoder: Encoder, samples: Sequence[Sample], modes: Sequence[Mode] = ("llm", "mllm")
) -> dict[str, list[list[float]]]:
    """MKNN of all heads on captions alone (``llm``) and on pictures with captions (``mllm``)."""
    features = features_of(root, shown(samples))
    encoded = {"llm": encoder.captions, "mllm": encoder.encode}
    return {mode: head_scores(model, encoder.batches(encoded[mode](samples)), features, mode) for mode in modes}


def answer_all(model: Any, encoder: Encoder, samples: Sequence[Sample]) -> dict[str, float]:
    """The share of questions that greedy decoding answers exactly, by category, and their ``mean``.

    Decoding gives the true answer if and only if each of its tokens, its end too, is the most likely one behind the
    true ones before it: one forward pass tells.
    """
    right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    rows = encoder.encode(samples)
    for start, batch in zip(range(0, len(rows), _ANSWERED), encoder.batches(rows), strict=True):
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            likely = model.eval()(**batch).logits[:, :-1].argmax(dim=-1)
        exact = ((likely == labels) | (labels == IGNORE_INDEX)).all(dim=1).tolist()
        for sample, is_right in zip(samples[start : start + _ANSWERED], exact, strict=True):
            right[sample.category].append(is_right)
    shares = {category: sum(found) / len(found) for category, found in right.items()}
    return shares | {"mean": sum(shares.values()) / len(shares)}
