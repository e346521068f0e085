"""What a HeRA run says of itself before its first step."""

from typing import TYPE_CHECKING

from llamafactory.extras import logging

from llamafactory_hera.alignment.gather import world_size

if TYPE_CHECKING:
    from .trainer import HeraTrainer

logger = logging.get_logger("llamafactory.hera")  # a child of the host's logger, which has the handlers


def start_summary(trainer: "HeraTrainer") -> None:
    """Logs objective, sites, teacher, batch sizes and candidates; warns when the candidates are few."""
    args, hera = trainer.args, trainer.finetuning_args
    micro_batch = args.per_device_train_batch_size * world_size()
    steps = args.gradient_accumulation_steps
    together = micro_batch * (steps if hera.hera_accumulate == "gradcache" else 1)
    candidates = together - 1 + hera.hera_memory
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    step = trainer.hera
    own = sum(p.numel() for p in step.objective.parameters() if p.requires_grad)
    lines = {
        step.sites.KEY.removeprefix("hera_"): str(step.sites),
        "teacher": f"{hera.hera_teacher} ({step.teaching.teacher.dim} values)",
        "objective": f"{hera.hera_objective}, weight {hera.hera_weight}",
        "global batch": f"{micro_batch * steps} ({world_size()} processes x "
        f"{args.per_device_train_batch_size} x {steps} accumulation steps)",
        "trainable parameters": f"{trainable:,} of the model, {own:,} of the objective",
    }
    lines |= {key.removeprefix("hera_"): f"{value:.4g}" for key, value in step.objective.values().items()}
    if step.objective.uses_candidates:
        lines["neighbours"] = str(hera.hera_k)
        up_to = "up to " if hera.hera_memory else ""  # the memory fills while training
        lines["candidates per sample"] = (
            f"{up_to}{candidates} ({together - 1} of the batch, {up_to}{hera.hera_memory} remembered)"
        )
    for name, value in lines.items():
        logger.info_rank0(f"HeRA | {name}: {value}")
    if step.objective.uses_candidates and candidates < 2 * hera.hera_k:
        logger.warning_rank0(
            f"hera_k: {hera.hera_k} neighbours among {candidates} candidates say little; use a larger batch per "
            f"device, more processes, or hera_memory: {max(4 * hera.hera_k, 64)}."
        )
