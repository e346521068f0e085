"""Refuses settings, trainers and models under which HeRA would be wrong or do nothing, before the first step."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import HeraConfig
from ..distributed import world_size
from ..heads import Targets
from ..heads.families import head_layout, trainable_upstream
from ..heads.targets import AUTO
from ..teachers.images import is_stream


def named_targets(config: HeraConfig, model_configuration: Any) -> Targets:
    """Reads the heads or layers that a configuration names; ``ValueError`` if they must be selected first."""
    if config.named_targets == AUTO:
        raise ValueError(
            f"{config.targets_key}: auto selects before training, which a Trainer with HeRA does. In your own loop "
            "name the file that a selection wrote."
        )
    return Targets.parse(config.named_targets, config.granularity, head_layout(model_configuration))


def idle_message(targets: Targets, why: str) -> str:
    """Says that the term cannot change the targets, and what to do."""
    return (
        f"{targets.key}: the HeRA term cannot change {targets}: {why}. Train something before them (the projector, "
        "the language model, or adapters on more of its layers), or choose later layers."
    )


def check_trainable(model: nn.Module, targets: Targets) -> None:
    """Refuses a model in which nothing that feeds the targets is trained."""
    whole_layer = targets.granularity == "layer"
    if not any(trainable_upstream(model, layer, whole_layer) for layer in targets.layers):
        trained = ", ".join([name for name, p in model.named_parameters() if p.requires_grad][:3]) or "nothing"
        raise ValueError(idle_message(targets, f"nothing that feeds them is trained (only {trained} …)"))


def check_batch(config: HeraConfig, training_args: Any) -> None:
    """Raises ``ValueError`` if the global batch and the remembered samples are too few for the objective."""
    least, size = config.objective_class().least_samples, training_args.per_device_train_batch_size
    together = size * world_size()
    if config.gradcache:
        together *= training_args.gradient_accumulation_steps
    uses_memory = config.reads("hera_memory")
    if together + config.memory * uses_memory < least:
        memory = f"set hera_memory: {4 * config.k}, " if uses_memory else ""
        raise ValueError(
            f"per_device_train_batch_size: {size} gives batches of {together} over all processes, and hera_objective: "
            f"{config.objective} needs {least} samples together; raise it, use more processes, {memory}or, under "
            "gradient accumulation, hera_accumulate: gradcache."
        )


def check_output(output_dir: str, inputs: Mapping[str, str | None]) -> None:
    """Raises ``ValueError`` if the output folder is one that the run reads; ``inputs`` maps keys to their values."""
    for key, value in inputs.items():
        if value and Path(value).expanduser().resolve() == Path(output_dir).expanduser().resolve():
            raise ValueError(f"output_dir: {output_dir} is also {key}, which the run reads; give it another folder.")


def check_parallelism(training_args: Any) -> None:
    """Refuses sequence, context and tensor parallelism, under which a process lacks parts of a sample or a head."""
    parallelism = getattr(training_args, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, 1) or 1 for name in ("sp_size", "cp_size", "tp_size")}
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    sizes["sequence_parallel_size"] = deepspeed.get("sequence_parallel_size", 1)
    split = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if split:
        raise ValueError(
            f"parallelism_config: {', '.join(split)} splits a sample or its heads over processes, and HeRA needs "
            "whole samples on a process; use data parallelism (DDP, ZeRO or FSDP)."
        )


def check_settings(config: HeraConfig, trainer: Any) -> None:
    """Raises ``ValueError`` for arguments or a model of a Trainer with which HeRA cannot work."""
    args = trainer.args
    check_batch(config, args)
    model = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    inputs = {"hera_teacher_cache": config.teacher_cache, "hera_teacher": config.teacher, "model": model}
    check_output(args.output_dir, inputs)
    check_parallelism(args)
    if trainer.model_init is not None:
        raise ValueError("model_init: train() would build another model than the one that is read; pass a model.")
    devices = sorted({str(device) for device in getattr(trainer.model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(f"device_map: the model is on {', '.join(devices)}, and HeRA needs one device; remove it.")
    if is_stream(trainer.train_dataset) and world_size() > 1 and trainer.accelerator.dispatch_batches is not False:
        raise ValueError(
            "accelerator_config: with dispatch_batches one process reads the stream for all and joins batches by the "
            "keys of the first one, which loses images; set accelerator_config: {dispatch_batches: false}."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: {args.n_gpu} devices in one process train copies of the model (nn.DataParallel), whose heads "
            "cannot be read; start one process per device (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES "
            "to one."
        )
    if "unsloth" in sys.modules:
        raise ValueError(
            "unsloth: its import replaces the attention and the checkpointing from which heads are read; load the "
            "model with transformers, and do not import unsloth."
        )
