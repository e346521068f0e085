"""Refuses settings, trainers and models under which HeRA would be wrong or do nothing, before the first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..alignment.batches import LEAST_GROUPED
from ..alignment.gather import world_size
from ..config import HeraConfig
from ..objectives import Objective, find
from ..teachers.images import is_stream

# Keys of hosts that order samples, or leave them no order to choose; with the value that does not.
_ORDERS: dict[str, Any] = dict.fromkeys(
    ("streaming", "disable_shuffling", "group_by_length", "curriculum_sampling"), False
)
_ORDERS |= {"train_sampling_strategy": "random"}


def check_batch(config: HeraConfig, training_args: Any, *others: Any) -> None:
    """Checks that a batch over all processes holds the samples that the objective needs together.

    Raises:
        ValueError: It holds fewer, those included that are remembered; or, under ``hera_batches: neighbors``, these
            arguments or other ones of the host ask for an order of samples.
    """
    for key, value in ((key, getattr(each, key, None)) for each in (training_args, *others) for key in _ORDERS):
        if config.batches == "neighbors" and value not in (None, _ORDERS[key]):
            raise ValueError(
                f"{key}: {value} orders the samples, and so does hera_batches: neighbors; set {key}: "
                f"{str(_ORDERS[key]).lower()}, or hera_batches: random."
            )
    objective = find(config.objective)
    size = training_args.per_device_train_batch_size
    together = size * world_size()
    if config.accumulate == "gradcache":
        together *= training_args.gradient_accumulation_steps
    if config.batches == "neighbors" and together < LEAST_GROUPED:
        raise ValueError(
            f"per_device_train_batch_size: {size} gives batches of {together} over all processes, and hera_batches: "
            f"neighbors makes groups in batches of {LEAST_GROUPED} at least; raise it, use more processes, or set "
            "hera_batches: random."
        )
    if together + config.memory < objective.least_samples:
        memory = f"set hera_memory: {4 * config.k}, " if objective.uses_candidates else ""
        raise ValueError(
            f"per_device_train_batch_size: {size} gives batches of {together} over all processes, and hera_objective: "
            f"{config.objective} needs {objective.least_samples} samples together; raise it, use more processes, "
            f"{memory}or, under gradient accumulation, hera_accumulate: gradcache."
        )


def check_eval(config: HeraConfig, folder: str = "FOLDER") -> None:
    """Refuses an evaluation that nobody starts; ``folder`` is that of the finished model."""
    if config.eval != "none":
        raise ValueError(
            f"hera_eval: {config.eval} evaluates after runs of LLaMA-Factory; leave it out, and use "
            f"`llamafactory-hera eval {folder} --suite {config.eval}` on the finished model."
        )


def check_output(output_dir: str, teacher_cache: str | None, apart: Mapping[str, str | None]) -> None:
    """Checks that a run writes where nothing lies that it reads.

    Args:
        output_dir: Where it writes.
        teacher_cache: Its ``hera_teacher_cache``, which may not be there yet.
        apart: Other keys with folders; what is not a folder, such as a hub id, is left out.

    Raises:
        ValueError: ``output_dir`` is one of them, or inside of one, or around it.
    """
    output = Path(output_dir).expanduser().resolve()
    for key, value in {"hera_teacher_cache": teacher_cache, **apart}.items():
        place = Path(value or ".").expanduser().resolve()
        own = place.parent == output and place.name.startswith(PREFIX_CHECKPOINT_DIR)  # one of the folder's run
        if not value or own or not (place.is_dir() or value == teacher_cache):
            continue
        where = "is" if place == output else "lies in" if place in output.parents else "is around"
        if where != "is around" or output in place.parents:
            raise ValueError(
                f"output_dir: {output_dir} {where} {key}: {value}, which the run reads and would overwrite or mix "
                "with its own files; give it a folder of its own."
            )


def check_attention(objective: type[Objective], name: str, model_config: Any, used: str | None) -> None:
    """Checks that a model with the attention ``used`` takes the mask that an objective plans, if it does.

    Raises:
        ValueError: FlashAttention, or layers with a sliding window.
    """
    if not objective.plans_attention:
        return
    if used not in (None, "auto", "disabled", "sdpa", "eager"):
        raise ValueError(
            f"flash_attn: {used} takes no mask of single tokens, and hera_objective: {name} plans one; set "
            "flash_attn: sdpa (attn_implementation in transformers)."
        )
    text = model_config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) if kinds is None else None
    if window or set(kinds or []) - {"full_attention"}:
        raise ValueError(
            f"hera_objective: {name} plans which token sees which, and {text.model_type} has layers with a sliding "
            "window or chunks of their own; use a model without, or another objective."
        )


def check_parallelizm(training_args: Any) -> None:
    """Checks that every process has whole samples and whole heads.

    Raises:
        ValueError: Sequence, context or tensor parallelizm.
    """
    parallelizm = getattr(training_args, "parallelizm_config", None)
    sizes = {name: getattr(parallelizm, name, 1) or 1 for name in ("sp_size", "cp_size", "tp_size")}
    deepspeed = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None) or {}
    sizes["sequence_parallel_size"] = deepspeed.get("sequence_parallel_size", 1)
    split = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    if split:
        raise ValueError(
            f"parallelizm_config: {', '.join(split)} splits a sample or its heads over processes, and HeRA needs "
            "whole samples on a process; use data parallelizm (DDP, ZeRO or FSDP)."
        )


def check_settings(config: HeraConfig, trainer: Any) -> None:
    """Checks a Trainer's arguments, and that nobody has replaced the attention of its model.

    Raises:
        ValueError: As above; or an evaluation that nobody starts, ``nn.DataParallel``, a model over several devices,
            ``model_init``, a stream that one process reads for all, or Unsloth's patches.
    """
    check_batch(config, trainer.args, getattr(trainer, "finetuning_args", None))
    model = getattr(getattr(trainer.model, "config", None), "_name_or_path", None)
    check_output(trainer.args.output_dir, config.teacher_cache, {"hera_teacher": config.teacher, "model": model})
    check_parallelizm(trainer.args)
    check_eval(config, trainer.args.output_dir)
    if config.batches == "neighbors" and is_stream(trainer.train_dataset):
        raise ValueError(
            "train_dataset: a stream has an order of its own, and hera_batches: neighbors makes one; give a dataset "
            "whose rows have numbers, or set hera_batches: random."
        )
    if trainer.model_init is not None:
        raise ValueError(
            "model_init: train() would build another model than that whose heads are read; give the trainer a model."
        )
    devices = sorted({str(device) for device in getattr(trainer.model, "hf_device_map", {}).values()})
    if len(devices) > 1:
        raise ValueError(
            f"device_map: the model lies on {', '.join(devices)}, and HeRA needs one; load it without device_map."
        )
    if is_stream(trainer.train_dataset) and world_size() > 1 and trainer.accelerator.dispatch_batches is not False:
        raise ValueError(
            "accelerator_config: with dispatch_batches one process reads the stream for all and joins batches by what "
            "the first one holds, which loses images; set accelerator_config: {dispatch_batches: false}."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: {trainer.args.n_gpu} devices in one process train copies of the model (nn.DataParallel), where "
            "heads cannot be read; start one process for each (torchrun, accelerate launch), or set "
            "CUDA_VISIBLE_DEVICES to one."
        )
    parts = set(type(trainer).__mro__) | {type(module) for module in trainer.model.modules()}
    checkpointing = {getattr(module, "_gradient_checkpointing_func", None) for module in trainer.model.modules()}
    of_unsloth = sorted(_origin(part) for part in [*parts, *checkpointing] if "unsloth" in _origin(part).lower())
    if of_unsloth:
        raise ValueError(
            f"Unsloth replaces the attention that heads are read from, or the checkpointing that carries them "
            f"({of_unsloth[0]}); load the model with transformers, and do not import unsloth."
        )


def _origin(part: Any) -> str:
    """Where a class, or the forward pass that was put into it, or a function comes from."""
    forward = getattr(part, "forward", None)
    names = (getattr(thing, name, "") for thing in (part, forward) for name in ("__module__", "__qualname__"))
    return " ".join(str(name) for name in names if name)
