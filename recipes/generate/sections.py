"""The sections of keys that recipes are made of."""

from typing import Any

from llamafactory_hera.backbones.table import TEACHER

from .memory import Batches

#: Name of a section and its keys.
Section = tuple[str, dict[str, Any]]

#: LLM and projector are trained in full, with parameters, gradients and optimizer sharded.
FULL: dict[str, Any] = {
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": False,
    "deepspeed": "recipes/deepspeed/zero3.json",
}

#: The projector alone is trained: nothing to shard.
PROJECTOR: dict[str, Any] = {
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": True,
}

QUANTISED: dict[str, Any] = {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}


def lora(rank: int, projector: str | None) -> dict[str, Any]:
    """Adapters on every linear layer of the LLM, and the projector in full where it is named."""
    keys = {"finetuning_type": "lora", "lora_rank": rank, "lora_alpha": 2 * rank, "lora_target": "all"}
    return keys | ({"additional_target": projector} if projector else {})


def model(name_or_path: str, **keys: Any) -> Section:
    """Which model."""
    return ("model", {"model_name_or_path": name_or_path, **keys})


def method(keys: dict[str, Any]) -> Section:
    """What is trained."""
    return ("method", {"stage": "hera", "do_train": True, **keys})


def hera(heads: str, batches: Batches, **keys: Any) -> Section:
    """The paper's settings, and the memory that this batch needs."""
    return (
        "hera",
        {
            "hera_heads": heads,
            **keys,
            "hera_teacher": TEACHER,
            "hera_weight": 0.01,
            "hera_k": 10,
            "hera_temperature": 0.07,
            "hera_memory": batches.hera_memory,
        },
    )


def data(dataset: str, template: str, cutoff: int) -> Section:
    """A dataset of ``recipes/data/dataset_info.json``."""
    return (
        "dataset",
        {
            "dataset_dir": "recipes/data",
            "dataset": dataset,
            "media_dir": f"recipes/data/{dataset}/images",
            "template": template,
            "cutoff_len": cutoff,
            "preprocessing_num_workers": 16,
            "dataloader_num_workers": 4,
        },
    )


def output(folder: str) -> Section:
    """Where results go."""
    return (
        "output",
        {
            "output_dir": f"saves/{folder}",
            "logging_steps": 10,
            "save_steps": 1000,
            "save_total_limit": 1,
            "plot_loss": True,
            "report_to": "none",
        },
    )


def train(batches: Batches, learning_rate: str, **keys: Any) -> Section:
    """One epoch of LLaVA-1.5's schedule."""
    return (
        "train",
        {
            "per_device_train_batch_size": batches.per_device,
            "gradient_accumulation_steps": batches.accumulation,
            **keys,
            "learning_rate": learning_rate,
            "num_train_epochs": 1.0,
            "lr_scheduler_type": "cosine",
            # not warmup_steps: 0.03, which transformers 4 takes for no warm-up at all
            "warmup_ratio": 0.03,
            "bf16": True,
            "ddp_timeout": 180000000,
        },
    )
