"""The messages of a run, made visible in the same way in every host.

The library logs to one logger, ``llamafactory_hera``, and configures nothing when it is imported.
"""

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..distributed import rank, world_size

if TYPE_CHECKING:
    from torch import nn

    from ..training import Aligner

logger = logging.getLogger("llamafactory_hera")


def show_messages(host: logging.Logger | None = None) -> None:
    """Makes messages of level INFO and above visible, unless the user has chosen another level.

    Args:
        host: A host's logger. Messages then share its level and its handlers.
    """
    if host is not None:
        logger.setLevel(host.level)
        for handler in host.handlers:
            logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    logger.addHandler(_FALLBACK)


class _Fallback(logging.Handler):
    """Prints the messages of the first process, and the warnings of all, that no other handler prints."""

    def filter(self, record: logging.LogRecord) -> bool:
        printed = any(_prints(handler, record) for handler in _handlers() if handler is not self)
        return not printed and (rank() == 0 or record.levelno >= logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _handlers() -> Iterator[logging.Handler]:
    """Lists the handlers that a message reaches."""
    current: logging.Logger | None = logger
    while current is not None:
        yield from current.handlers
        current = current.parent if current.propagate else None


def _prints(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Whether a handler prints a record, and does not drop it or write it into a file."""
    if isinstance(handler, logging.NullHandler) or getattr(handler, "stream", sys.stderr) not in (
        sys.stdout,
        sys.stderr,
    ):
        return False
    return record.levelno >= handler.level and bool(handler.filter(record))


_FALLBACK = _Fallback()
_FALLBACK.setFormatter(logging.Formatter("[%(levelname)s|%(name)s] %(asctime)s >> %(message)s"))


def log_setup(aligner: "Aligner", model: "nn.Module", training_args: Any) -> None:
    """Logs what a run aligns, on the first process: heads or layers, teacher, objective, batch and candidates."""
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
