"""The recipes that a study gives to the host: one function for each of its calls."""

from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from . import layout
from .dataset import CAPTIONS, TEXT, TRAIN, captions_of, questions_of
from .layout import Seed
from .settings import Settings
from .world import StudySplit

_HOST = {
    "do_train": True,
    "finetuning_type": "full",
    "disable_gradient_checkpointing": True,
    "dataset_dir": layout.DATA,
    "cutoff_len": 256,
    "overwrite_output_dir": True,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "bf16": False,
    "use_cpu": True,
    "dataloader_num_workers": 0,
}
_MULTIMODAL = {"freeze_vision_tower": True, "freeze_multi_modal_projector": False}
_HERA = {"hera_teacher": layout.TEACHER, "hera_teacher_cache": layout.TEACHER_CACHE}


def pretraining(settings: Settings, seed: Seed) -> dict[str, Any]:
    """The language model on text alone."""
    return _HOST | {
        "model_name_or_path": seed.untrained,
        "stage": "pt",
        "dataset": TEXT,
        "template": "empty",
        "cutoff_len": 256,
        "output_dir": seed.language_model,
        "per_device_train_batch_size": 16,
        "learning_rate": 4.0e-3,
        "max_steps": settings.language_steps,
        "seed": seed.number,
    }


def stage1(settings: Settings, seed: int, output: str, hera: dict[str, Any] | None) -> dict[str, Any]:
    """LLaVA's stage 1: the projector alone, on captions."""
    return (
        _HOST
        | _MULTIMODAL
        | {
            "model_name_or_path": Seed(seed).llava,
            "freeze_language_model": True,
            "dataset": CAPTIONS,
            "template": "llava_plain",
            "tokenized_path": layout.tokenized("stage1"),
            "output_dir": output,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.stage1_rate,
            "max_steps": settings.stage1_steps,
            "seed": seed,
        }
        | _method(settings, hera)
    )


def stage2(
    settings: Settings, seed: int, model: str, output: str, hera: dict[str, Any] | None, split: StudySplit
) -> dict[str, Any]:
    """LLaVA's stage 2: projector and language model on questions, then answers to a split's questions."""
    return (
        _HOST
        | _MULTIMODAL
        | {
            "model_name_or_path": model,
            "freeze_language_model": False,
            "do_predict": True,
            "predict_with_generate": True,
            "do_sample": False,
            "max_new_tokens": 12,
            "per_device_eval_batch_size": 100,
            "dataset": TRAIN,
            "eval_dataset": questions_of(split),
            "template": "llava_qwen3",
            "tokenized_path": layout.tokenized(f"stage2_{split}"),
            "output_dir": output,
            "per_device_train_batch_size": settings.batch_size,
            "learning_rate": settings.stage2_rate,
            "max_steps": settings.stage2_steps,
            "seed": seed,
        }
        | _method(settings, hera)
    )


def scoring(settings: Settings, model: str, split: StudySplit, output: str) -> dict[str, Any]:
    """What head scores need to know: model, teacher and captions."""
    return (
        _HOST
        | _HERA
        | {
            "model_name_or_path": model,
            "stage": "hera",
            "hera_heads": "auto",
            "hera_select_samples": settings.scored,
            "hera_select_batch_size": 64,
            "dataset": captions_of(split),
            "template": "llava_plain",
            "output_dir": output,
        }
    )


def write(path: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe as YAML."""
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def _method(settings: Settings, hera: dict[str, Any] | None) -> dict[str, Any]:
    if hera is None:
        return {"stage": "sft"}
    return {"stage": "hera", "hera_k": settings.neighbours} | _HERA | hera
