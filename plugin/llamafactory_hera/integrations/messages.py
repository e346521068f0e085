"""The messages of a run, made visible in the same way in every host.

The library logs to one logger, ``llamafactory_hera``, and configures nothing when it is imported.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..config import HeraConfig
from ..distributed import rank, world_size
from ..keys import typed

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


@contextmanager
def translated(translate: Callable[[str], str]) -> Iterator[None]:
    """Changes the messages of errors."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if error.args == (str(error),):  # not an error such as UnicodeDecodeError
            error.args = (translate(str(error)),)
        raise


def in_python(message: str) -> str:
    """Writes keys as arguments of ``HeraConfig``, for instance ``hera_pooling: text`` as ``pooling='text'``."""

    def argument(match: re.Match[str]) -> str:
        declared = HeraConfig.knobs().get(match[1])
        if declared is None:
            return match[0]
        with suppress(ValueError):  # a text may be the first of several words
            if match[2] and declared.type not in (str, str | None):
                return f"{declared.name}={typed(match[1], match[2], declared.type)!r}"
        return declared.name + match[0].removeprefix(match[1])

    return re.sub(r"\b(hera_\w+)(?:: ([\w-]+(?:\.\w+)*))?", argument, message)


def log_setup(aligner: "Aligner", model: "nn.Module", training_args: Any) -> None:
    """Logs the setup of a run on the first process: heads or layers, teacher, objective, batch and candidates."""
    if rank() > 0:
        return
    config, objective = aligner.config, aligner.objective
    size, steps = aligner.batch_size or 1, training_args.gradient_accumulation_steps
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
        in_batch, remembered = micro_batch * (steps if config.gradcache else 1) - 1, aligner.memory.size or 0
        candidates = in_batch + remembered
        taken = min(config.k, candidates // 2)
        counted = f"{taken} of {candidates} candidates ({in_batch} of the batch, {remembered} remembered)"
        counted += f"; hera_k: {config.k} needs {2 * config.k} candidates" * (taken < config.k)
        lines["neighbors"] = counted + "; hera_mknn is logged once the memory is full" * (remembered > 0)
    for name, value in lines.items():
        logger.info(f"HeRA | {name}: {value}")
