"""What a HeRA run says of itself before its first step."""

from typing import TYPE_CHECKING

from llamafactory.extras import logging

from llamafactory_hera.alignment.gather import world_size

if TYPE_CHECKING:
    from .trainer import HeraTrainer

logger = logging.get_logger("llamafactory.hera")  # a child of the host's logger, which has the handlers


def start_summary(trainer: "HeraTrainer") -> None:
    """Logs heads, teacher, batch sizes and candidates; warns when the candidates are few."""
    args, hera = trainer.args, trainer.finetuning_args
    micro_batch = args.per_device_train_batch_size * world_size()
    steps = args.gradient_accumulation_steps
    together = micro_batch * (steps if hera.hera_accumulate == "gradcache" else 1)
    candidates = together - 1 + hera.hera_memory
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    lines = {
        "heads": str(trainer.hera.heads),
        "teacher": f"{hera.hera_teacher} ({trainer.hera.teacher.dim} values)",
        "weight, k, temperature": f"{hera.hera_weight}, {hera.hera_k}, {trainer.hera.temperature.value:.4g}",
        "global batch": f"{micro_batch * steps} ({world_size()} processes x "
        f"{args.per_device_train_batch_size} x {steps} accumulation steps)",
        "candidates per sample": f"{candidates} ({together - 1} of the batch, {hera.hera_memory} remembered)",
        "trainable parameters": f"{trainable:,}",
    }
    for name, value in lines.items():
        logger.info_rank0(f"HeRA | {name}: {value}")
    if candidates < 2 * hera.hera_k:
        logger.warning_rank0(
            f"hera_k: {hera.hera_k} neighbours among {candidates} candidates say little; use a larger batch per "
            f"device, more processes, or hera_memory: {max(4 * hera.hera_k, 64)}."
        )
