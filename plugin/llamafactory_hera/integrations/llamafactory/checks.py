"""Refuses settings and models with which HeRA would be wrong or do nothing, before any weight is loaded."""

from typing import Any

from llamafactory_hera.alignment.gather import world_size
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.families import head_layout, is_multimodal
from llamafactory_hera.heads.pooling import grid_side
from llamafactory_hera.objectives import find
from llamafactory_hera.teachers.checkpoint import check_teacher

# Key -> why it cannot work, and what to do.
_MODEL_KEYS = {
    "use_unsloth": "Unsloth replaces the attention that heads are read from; remove it",
    "use_unsloth_gc": "its checkpointing cannot carry the heads' outputs; remove it, or set use_reentrant_gc: false",
    "use_kt": "KTransformers runs layers outside of PyTorch; remove it",
    "mixture_of_depths": "tokens skip layers, so a head has no average over them; remove it",
    "shift_attn": "it moves tokens between heads; remove it",
}
_DATA_KEYS = {
    # first: the host sets packing where neat_packing is asked for
    "neat_packing": "a packed row holds several samples, and HeRA compares samples; set it to false",
    "packing": "a packed row holds several samples, and HeRA compares samples; set it to false",
}


def check_run(config: HeraConfig, model_args: Any, data_args: Any, training_args: Any) -> None:
    """Checks everything that needs no model.

    Raises:
        ValueError: Names the key, the value and the remedy.
    """
    for arguments, keys in ((model_args, _MODEL_KEYS), (data_args, _DATA_KEYS)):
        for key, why in keys.items():
            value = getattr(arguments, key, None)
            if value:
                raise ValueError(f"{key}: {value} does not work with stage: hera: {why}.")
    _check_parallelism(training_args)
    check_teacher(config.teacher)
    _check_batch(config, training_args)


def _check_batch(config: HeraConfig, training_args: Any) -> None:
    objective = find(config.objective)
    together = training_args.per_device_train_batch_size * world_size()
    if config.accumulate == "gradcache":
        together *= training_args.gradient_accumulation_steps
    if together >= objective.least_samples or config.memory > 0:
        return
    size = training_args.per_device_train_batch_size
    if objective.uses_candidates:
        raise ValueError(
            f"per_device_train_batch_size: {size} on one process leaves a sample without another to be compared with; "
            f"raise it, use more processes, or set hera_memory: {4 * config.k}; under gradient "
            "accumulation hera_accumulate: gradcache takes the step's micro-batches together."
        )
    raise ValueError(
        f"per_device_train_batch_size: {size} gives batches of {together} over all processes, and hera_objective: "
        f"{config.objective} needs {objective.least_samples} samples together; raise it, use more "
        "processes or, under gradient accumulation, hera_accumulate: gradcache."
    )


def _check_parallelism(training_args: Any) -> None:
    parallelism = getattr(training_args, "parallelism_config", None)
    sizes = {name: getattr(parallelism, name, 1) or 1 for name in ("sp_size", "cp_size", "tp_size")}
    split = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    if deepspeed.get("sequence_parallel_size", 1) > 1:
        split.append(f"sequence_parallel_size={deepspeed['sequence_parallel_size']}")
    if split:
        raise ValueError(
            f"parallelism_config: {', '.join(split)} splits a sample or its heads over processes, and stage: hera "
            "needs whole samples on a process; use data parallelism (DDP, ZeRO or FSDP)."
        )


def check_model(config: HeraConfig, model_args: Any, targets: Targets | None = None) -> None:
    """Checks from its configuration alone that the model sees images and has what is aligned, where that is known.

    Raises:
        ValueError: A text-only model, an unknown architecture, a head or layer outside the model, or images that the
            objective cannot read.
    """
    from llamafactory.model import load_config

    model_config = load_config(model_args)
    name = model_args.model_name_or_path
    if not is_multimodal(model_config):
        raise ValueError(
            f"model_name_or_path: {name} is a text-only model ({model_config.model_type}), and HeRA aligns heads with "
            "what images show; give a multimodal model (`llamafactory-hera build` makes one from an LLM)."
        )
    layout = head_layout(model_config)
    if find(config.objective).view == "patches":
        grid_side(model_config, config.objective)
    if targets is not None:
        targets.check(layout)
