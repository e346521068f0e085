"""Creates the sections of keys in a recipe."""

from typing import Any

from llamafactory_hera.backbones.table import TEACHER

from .memory import Batches

#: The name of a section, and its keys.
Section = tuple[str, dict[str, Any]]

#: Full training of the LLM and the projector, with sharded parameters, gradients and optimizer state.
FULL: dict[str, Any] = {
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": False,
    "deepspeed": "recipes/deepspeed/zero3.json",
}

#: Training of the projector only, which needs no sharding.
PROJECTOR: dict[str, Any] = {
    "finetuning_type": "full",
    "freeze_vision_tower": True,
    "freeze_multi_modal_projector": False,
    "freeze_language_model": True,
}

QUANTIZED: dict[str, Any] = {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}


def lora(rank: int, projector: str | None) -> dict[str, Any]:
    """Returns keys for LoRA on every linear layer of the LLM and, if given, full training of the projector."""
    keys = {"finetuning_type": "lora", "lora_rank": rank, "lora_alpha": 2 * rank, "lora_target": "all"}
    return keys | ({"additional_target": projector} if projector else {})


def model(name_or_path: str, **keys: Any) -> Section:
    """Returns the section of the model to train."""
    return ("model", {"model_name_or_path": name_or_path, **keys})


def method(keys: dict[str, Any]) -> Section:
    """Returns the section that sets the trained part of the model."""
    return ("method", {"stage": "hera", "do_train": True, **keys})


def hera(heads: str, batches: Batches) -> Section:
    """Returns the section with the paper's settings, and the ``hera_memory`` for this batch."""
    return (
        "hera",
        {
            "hera_heads": heads,
            "hera_teacher": TEACHER,
            "hera_weight": 0.01,
            "hera_k": 10,
            "hera_temperature": 0.07,
            "hera_memory": batches.hera_memory,
        },
    )


def data(dataset: str, template: str, cutoff: int) -> Section:
    """Returns the section of a dataset in ``recipes/data/dataset_info.json``."""
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
    """Returns the section for the output folder, checkpoints and logging."""
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
    """Returns the section for one epoch with the schedule of LLaVA-1.5."""
    return (
        "train",
        {
            "per_device_train_batch_size": batches.per_device,
            "gradient_accumulation_steps": batches.accumulation,
            **keys,
            "learning_rate": learning_rate,
            "num_train_epochs": 1.0,
            "lr_scheduler_type": "cosine",
            # not warmup_steps, because transformers 4 reads warmup_steps: 0.03 as no warm-up
            "warmup_ratio": 0.03,
            "bf16": True,
            "ddp_timeout": 180000000,
        },
    )
