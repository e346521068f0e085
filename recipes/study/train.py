"""Runs one method with one seed: stage 1, stage 2, the answers, the MKNN of all heads, and the cost."""

import math
import resource
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from llamafactory_hera.alignment import nearest_neighbors, score_heads
from llamafactory_hera.config import HeraConfig, Mode
from llamafactory_hera.heads.probe import pooled_heads, projection_weights
from llamafactory_hera.heads.tokens import IGNORE_INDEX
from llamafactory_hera.integrations.transformers import HeraTrainer
from llamafactory_hera.selection.passes import Forward
from recipes.demo.models import IMAGE
from recipes.demo.scenes import GRID

from .parts import CACHE, TEACHER, features_of, load_llava
from .settings import METHODS, Method, Settings
from .world import END, Sample, World, prompt, shares

#: The number of neighbors for scoring heads, as in the paper.
NEIGHBORS = 10
_AT_ONCE = 256  # samples per forward pass


class Encoder:
    """Encodes samples; a call collates encoded samples into a batch."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        self._pad = tokenizer.pad_token_id
        self._image = [tokenizer.convert_tokens_to_ids(IMAGE)] * GRID**2
        self._ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Returns the tokens, the labels of the answer, the picture and its pixels; a caption has no question."""
        images = [sample.image for sample in samples]
        pixels = self._processor.image_processor(images, return_tensors="pt")["pixel_values"]
        rows = []
        for sample, pixel_values in zip(samples, pixels, strict=True):
            answer = self._ids(sample.answer + END)
            ids = [*self._image, *self._ids(prompt(sample.question)), *answer]
            labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
            rows.append({"input_ids": ids, "labels": labels, "images": [sample.image], "pixel_values": pixel_values})
        return rows

    def captions(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Returns the tokens of the captions alone."""
        return [{"input_ids": (ids := self._ids(sample.answer)), "labels": ids} for sample in samples]

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
        """Collates all rows in order, ``_AT_ONCE`` per batch."""
        for start in range(0, len(rows), _AT_ONCE):
            yield self(rows[start : start + _AT_ONCE])


def run(
    root: Path,
    world: World,
    settings: Settings,
    name: str,
    seed: int,
    chosen: float,
    heads: dict[str, list[str]],
    questions: dict[str, list[Sample]],
) -> dict[str, Any]:
    """Trains a model with one method, and measures it.

    Args:
        root: The study's folder.
        world: The samples.
        settings: The settings of the study.
        name: One of ``METHODS``.
        seed: The seed of the LLaVA and of the order of samples.
        chosen: The weight of the loss for methods that do not set one.
        heads: Names of heads by strategy.
        questions: The questions to ask after training, by set.

    Returns:
        ``accuracy`` by set and category, ``mknn`` by mode, layer and head, and ``cost``.
    """
    method, (model, processor) = METHODS[name], load_llava(root, seed)
    encoder = Encoder(processor)
    projector = model.get_submodule("model.multi_modal_projector")
    cost: dict[str, float] = {}
    stages = (
        (1, world.captions, settings.stage1_steps, settings.stage1_rate),
        (2, world.train, settings.stage2_steps, settings.stage2_rate),
    )
    for stage, samples, steps, rate in stages:
        model.requires_grad_(stage == 2)
        model.get_submodule("model.vision_tower").requires_grad_(False)
        projector.requires_grad_(True)
        arguments = TrainingArguments(
            str(root / f"runs/{name}-{seed}"),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.05 * steps),
            seed=seed,  # also seeds the order of samples
            use_cpu=True,
            logging_steps=max(1, steps // 20),
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        )
        common = {"train_dataset": encoder.encode(samples), "data_collator": encoder, "processing_class": processor}
        hera = None if stage not in method.stages else hera_config(root, settings, method, chosen, heads)
        make = Trainer if hera is None else partial(HeraTrainer, hera=hera)
        trainer = make(model, arguments, **common)
        started = time.process_time()
        trainer.train()
        cost[f"stage{stage}_cpu_s"] = time.process_time() - started
    cost["process_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "accuracy": {kind: answer_all(model, encoder, samples) for kind, samples in questions.items()},
        "mknn": measure(root, model, encoder, world.scored),
        "cost": cost,
    }


def hera_config(
    root: Path, settings: Settings, method: Method, chosen: float, heads: dict[str, list[str]]
) -> HeraConfig | None:
    """Returns a method's settings, or None for plain fine-tuning."""
    if method.keys is None:
        return None
    keys = {"teacher": str(root / TEACHER), "k": settings.neighbors, "weight": method.weight or chosen, **method.keys}
    objective = method.keys.get("objective", "contrastive")
    if objective == "contrastive":
        keys.setdefault("memory", settings.memory)
    if objective in ("contrastive", "cka"):  # the others read patch features, which the cache does not contain
        keys["teacher_cache"] = str(root / CACHE)
    if method.heads is not None:
        keys["heads"] = ",".join(heads[method.heads])
    return HeraConfig(**keys)


def measure(
    root: Path, model: Any, encoder: Encoder, samples: Sequence[Sample], modes: Sequence[Mode] = ("llm", "mllm")
) -> dict[str, list[list[float]]]:
    """Returns the MKNN of all heads, ``[L][H]``, on captions alone (``llm``) and with their pictures (``mllm``)."""
    teacher = features_of(root, [sample.image for sample in samples])
    neighbors = nearest_neighbors(teacher, min(NEIGHBORS, len(samples) - 2))
    weights, scores = list(projection_weights(model)), {}
    for mode in modes:
        forward, heads = Forward(model.eval(), mode), []
        for batch in encoder.batches(encoder.captions(samples) if mode == "llm" else encoder.encode(samples)):
            heads.append(pooled_heads(model, forward.tokens("text", batch), partial(forward.run, batch))[0])
        scores[mode] = score_heads(map(torch.cat, zip(*heads, strict=True)), weights, neighbors).tolist()
    return scores


def answer_all(model: Any, encoder: Encoder, samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the share of questions that greedy decoding answers exactly, by category, and their ``mean``.

    Decoding yields the true answer if and only if each of its tokens, including the end token, is the most likely one
    after the true tokens before it. A single forward pass therefore suffices.
    """
    right: list[bool] = []
    for batch in encoder.batches(encoder.encode(samples)):
        labels = batch.pop("labels")[:, 1:]
        with torch.inference_mode():
            likely = model.eval()(**batch).logits[:, :-1].argmax(dim=-1)
        right += ((likely == labels) | (labels == IGNORE_INDEX)).all(dim=1).tolist()
    return shares(samples, right)
