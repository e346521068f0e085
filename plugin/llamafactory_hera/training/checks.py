"""Before the first step, refuses settings, trainers and models with which HeRA would be wrong or do nothing."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..config import HeraConfig
from ..distributed import world_size
from ..heads import Targets
from ..heads.families import head_layout, model_config, trainable_upstream
from ..heads.fingerprint import model_fingerprint, weights_of
from ..heads.targets import AUTO, hub_id
from ..teachers.images import is_stream

#: The reason why 8-bit floating-point training is refused (https://github.com/pytorch/ao/issues/3111).
NO_FP8 = "fp8 matmuls need multiples of 16 tokens, but HeRA appends a row for each head"


def named_targets(config: HeraConfig, model: nn.Module) -> Targets:
    """Reads the heads or layers in the settings; refuses ``auto``, and a hub id selected for another model."""
    if config.named_targets == AUTO:
        raise ValueError(
            f"{config.targets_key}: auto works only in a Trainer with HeRA. In your own training loop, call "
            "llamafactory_hera.select_heads, and pass its result as targets."
        )
    configuration, value = model_config(model), config.named_targets
    targets = Targets.parse(value, config.granularity, configuration)
    if hub_id(value, targets.key) is None or config.heads_force:
        return targets
    if model_fingerprint(weights_of(model), head_layout(configuration)) != targets.provenance["model_fingerprint"]:
        model_of = f"{value} was selected for another model ({targets.provenance.get('model')})"
        raise ValueError(f"{targets.key}: {model_of}; select again, or set hera_heads_force: true.")
    return targets


def idle_message(targets: Targets, why: str) -> str:
    """Returns the error message for a term that cannot change the targets."""
    return (
        f"{targets.key}: the HeRA term cannot change {targets}: {why}. Train earlier parameters (the projector, "
        "the language model, or adapters on more of its layers), or choose later layers."
    )


def check_trainable(model: nn.Module, targets: Targets) -> None:
    """Refuses a model without a trained parameter that influences the targets."""
    whole_layer = targets.granularity == "layer"
    if not any(trainable_upstream(model, layer, whole_layer) for layer in targets.layers):
        trained = ", ".join([name for name, p in model.named_parameters() if p.requires_grad][:3]) or "nothing"
        raise ValueError(idle_message(targets, f"no trained parameter influences them (trained: {trained} …)"))


def check_output(output_dir: str, inputs: Mapping[str, str | None]) -> None:
    """Raises ``ValueError`` if the run also reads the output folder; ``inputs`` maps keys to their paths."""
    for key, value in inputs.items():
        if value and Path(str(value)).expanduser().resolve() == Path(output_dir).expanduser().resolve():
            raise ValueError(f"output_dir: {output_dir} is also {key}, which the run reads; choose another folder.")


def check_parallelism(training_args: Any, model: Any = None) -> None:
    """Refuses sequence, context, pipeline and tensor parallelism, which split a sample or a head across processes."""
    plugin = getattr(training_args, "deepspeed_plugin", None)
    deepspeed = getattr(plugin, "deepspeed_config", None) or {}
    settings: dict[str, Any] = {
        "parallelism_config": getattr(training_args, "parallelism_config", None),
        "deepspeed": SimpleNamespace(**{**deepspeed, **deepspeed.get("tensor_parallel", {})}),
        "distributed_config": getattr(getattr(model, "config", None), "distributed_config", None),
        "from_pretrained": model,
    }
    names = ("sp_size", "cp_size", "tp_size", "pp_size", "sequence_parallel_size", "autotp_size")
    for key, owner in settings.items():
        sizes = {name: getattr(owner, name, None) for name in names}
        split = [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size > 1]
        if split:
            raise ValueError(
                f"{key}: {', '.join(split)} splits a sample or its heads across processes, but HeRA needs whole "
                "samples on each process; use data parallelism (DDP, ZeRO or FSDP)."
            )


def check_settings(config: HeraConfig, trainer: Any) -> None:
    """Raises ``ValueError`` if HeRA cannot work with the arguments or the model of a Trainer."""
    args = trainer.args
    size, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    config.check_batch(size, steps, world_size(), trainer.pieces_of is not None)
    model = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    inputs = {"hera_teacher_cache": config.teacher_cache, "hera_teacher": config.teacher, "model": model}
    check_output(args.output_dir, inputs)
    check_parallelism(args, trainer.model)
    if trainer.accelerator.mixed_precision == "fp8":
        raise ValueError(f"mixed_precision: fp8 does not work with HeRA, because {NO_FP8}; use bf16.")
    if trainer.model_init is not None:
        raise ValueError("model_init: train() would build a new model, which HeRA does not read; pass a model.")
    devices = sorted({str(device) for device in getattr(trainer.model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(f"device_map: HeRA needs the model on one device, not {', '.join(devices)}; remove the map.")
    dispatched = trainer.accelerator.dispatch_batches
    if world_size() > 1 and (is_stream(trainer.train_dataset) if dispatched is None else dispatched):
        raise ValueError(
            "accelerator_config: with dispatch_batches, one process reads the data for all processes and joins "
            "batches by the first one's keys, losing images; set accelerator_config: {dispatch_batches: false}."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: {args.n_gpu} devices in one process train copies of the model (nn.DataParallel), whose heads "
            "HeRA cannot read; start one process per device (torchrun, accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES to one device."
        )
    if "unsloth" in sys.modules:
        raise ValueError(
            "unsloth: importing it replaces the attention and the checkpointing that HeRA relies on; load the "
            "model with transformers, and do not import unsloth."
        )
