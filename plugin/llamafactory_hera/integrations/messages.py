"""The messages of a run, made visible in the same way in every host.

The library logs to one logger, ``llamafactory_hera``, and configures nothing when it is imported.
"""

import logging
from typing import TYPE_CHECKING, Any

from ..distributed import rank, world_size

if TYPE_CHECKING:
    from torch import nn

    from ..training import Aligner

logger = logging.getLogger("llamafactory_hera")


def show_messages(host: logging.Logger | None = None) -> None:
    """Makes messages of level INFO and above visible, unless the user has chosen a different level.

    Args:
        host: A host's logger. Messages then share its level and its handlers. Without one, messages are printed unless
            the program has set up a handler that receives them.
    """
    if host is not None:
        logger.parent = host
        logger.setLevel(host.level)
        return
    if not logger.hasHandlers():
        printer = logging.StreamHandler()
        printer.setFormatter(logging.Formatter("[%(levelname)s|%(name)s] %(asctime)s >> %(message)s"))
        printer.addFilter(lambda record: rank() == 0 or record.levelno >= logging.WARNING)
        logger.addHandler(printer)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def log_setup(aligner: "Aligner", model: "nn.Module", training_args: Any) -> None:
    """Logs the setup of a run on the first process: heads or layers, teacher, objective, batch and candidates."""
    if rank() > 0:
        return
    config, objective = aligner.config, aligner.objective
    size, steps = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    micro_batch = size * world_size()
    trained = [sum(p.numel() for p in each.parameters() if p.requires_grad) for each in (model, objective)]
    lines = {
        aligner.targets.what: str(aligner.targets),
        "teacher": f"{config.teacher} ({aligner.teacher.encoder.dim} values)",
        "objective": f"{config.objective}, weight {config.weight}",
        "global batch": f"{micro_batch * steps} ({world_size()} processes x {size} x {steps} accumulation steps)",
        "trainable parameters": "{:,} of the model, {:,} of the objective".format(*trained),
    }
    lines |= {key.removeprefix("hera_"): f"{value:.4g}" for key, value in objective.values().items()}
    if config.reads("hera_memory"):
        in_batch = micro_batch * (steps if config.gradcache else 1) - 1
        up_to = "up to " if config.memory else ""
        counted = f"({in_batch} of the batch, {up_to}{config.memory} remembered)"
        counted += "; hera_mknn is logged once the memory is full" * (config.memory > 0)
        lines |= {"neighbors": str(config.k), "candidates per sample": f"{up_to}{in_batch + config.memory} {counted}"}
    for name, value in lines.items():
        logger.info(f"HeRA | {name}: {value}")
