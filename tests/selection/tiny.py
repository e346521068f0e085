"""Inputs of a small selection (real models, a real teacher, noise images and random captions), and score files."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.selection.samples import SelectionInputs
from llamafactory_hera.selection.scores import choose_targets
from llamafactory_hera.teachers.encoder import VisionTeacher
from tests.tiny_models import PAD, noise_images, teacher_folder, text_model, vlm, vlm_batch


def settings(**keys: Any) -> HeraConfig:
    """Makes the keys for selecting 3 heads on 40 samples; for example, ``select_m=5`` sets ``hera_select_m``."""
    keys = {"select_samples": 40, "select_k": 4, "select_m": 3, "select_batch_size": 8, "heads": "auto", **keys}
    return HeraConfig.from_keys({"hera_teacher": "tiny/teacher"} | {f"hera_{key}": keys[key] for key in keys})


class Rows:
    """A dataset in memory: the images and the features of each row."""

    def __init__(self, images: list[list], features: list[dict | None]) -> None:
        self._images, self._features = images, features

    def __len__(self) -> int:
        return len(self._images)

    def images(self, row: int) -> list:
        return self._images[row]

    def encode(self, row: int) -> dict | None:
        return self._features[row]


def captions(n: int, seed: int = 0) -> list[dict]:
    """Makes rows of 4 to 11 tokens; the first token has no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(4, 12, (1,), generator=generator))
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, *ids[1:]]})
    return rows


def pad_right(rows: list[dict]) -> dict:
    """Collates rows of token ids."""
    padding = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {name: pad_sequence([torch.tensor(row[name]) for row in rows], True, pad) for name, pad in padding.items()}


def text_inputs(folder: Path, n: int = 40, model: torch.nn.Module | None = None) -> SelectionInputs:
    """A language model with captions, as in the paper."""
    rows = Rows([[image] for image in noise_images(n)], captions(n))
    return _inputs(folder, rows, model or text_model("qwen3").eval(), pad_right)


def vlm_inputs(folder: Path, name: str = "llava-qwen3", n: int = 16) -> SelectionInputs:
    """A VLM with an image and at least three tokens of text in each row."""
    model = vlm(name).eval()
    batch = vlm_batch(model, rows=n, length=n + 4)
    features = []
    for row in range(n):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labels = [-100] * (len(ids) - 3) + ids[-3:]
        pixels = batch["pixel_values"][row]
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "pixels": pixels})

    def collate(rows: list[dict]) -> dict:
        return pad_right(rows) | {"pixel_values": torch.stack([row["pixels"] for row in rows])}

    return _inputs(folder, Rows([[image] for image in noise_images(n)], features), model, collate)


def _inputs(folder: Path, source: Rows, model: torch.nn.Module, collate: Any) -> SelectionInputs:
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
    return SelectionInputs(
        source=source,
        load_model=lambda: model,
        collator=lambda _: collate,
        load_teacher=partial(VisionTeacher.from_pretrained, teacher_folder()),
        model_name="tiny/model",
        weights=folder / "model",
        dataset_name="noise",
    )


#: The keys in the file of a selection.
KEYS = {"hera_select": "worst", "hera_select_m": 2, "hera_select_mode": "llm", "hera_select_k": 10}
KEYS |= {"hera_pooling": "answer", "hera_similarity": "cosine"}


def write_scores(path: Path, scores: list[list[float]], /, layers: list[str] | None = None, **provenance: Any) -> Path:
    """Writes the file of a selection of the two worst heads, or of the given layers; a NaN score is stored as null."""
    chosen = {"heads": list(map(str, choose_targets(scores, "worst", 2)))} if layers is None else {"layers": layers}
    row = {"score": 0.02, "mean": 0.01, "deviation": 0.002, "z": 5.0, "halves": 93}
    sample_counts = [{"samples": n, "mean": 0.2, "chance": 10 / (n - 1)} for n in (250, 500, 1000)]
    names = [name for chosen_names in chosen.values() for name in chosen_names]
    origin = {
        "firmness": {"chosen": dict.fromkeys(names, row), "rank_correlation": 0.81, "sample_counts": sample_counts},
        "model": "some/model",
        "teacher": "facebook/dinov2-large",
        "dataset": "captions",
        "model_fingerprint": "a" * 64,
        "teacher_fingerprint": "b" * 64,
        "samples_digest": "c" * 64,
        "samples": 1000,
        "keys": KEYS,
        "chance_level": 0.01,
        "layer_scores": [0.2] * len(scores),
        "scores": [[None if math.isnan(score) else score for score in row] for row in scores],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**chosen, "provenance": origin | provenance}))
    return path
