"""The messages of a run, made visible in the same way in every host.

The library logs to one logger, ``llamafactory_hera``, and configures nothing when it is imported.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import HeraConfig
from ..distributed import rank, world_size
from ..heads.families import FAMILIES, head_layout, model_config
from ..keys import typed

if TYPE_CHECKING:
    from torch import nn

    from ..training import Aligner

logger = logging.getLogger("llamafactory_hera")

# If the term's share of the loss exceeds this, a higher weight changes little.
_LARGE_SHARE = 0.4


def show_messages(host: logging.Logger | None = None) -> None:
    """Makes messages of level INFO and above visible, unless the user has chosen a different level.

    Args:
        host: A host's logger, whose level and handlers the messages then share. Without a host's logger, messages are
            printed unless the program has set up a handler that receives them.
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


def log_share(values: dict[str, float], weight: float) -> None:
    """Logs the weighted term's share of a log line's loss, or nothing if the share is unknown or 0."""
    term = weight * values.get("hera_loss", 0.0)
    total = values.get("lm_loss", 0.0) + term
    if rank() == 0 and 0 < term <= total:
        numbers = f"{weight:g} x {values['hera_loss']:.3g} of {total:.3g}"
        logger.info(f"HeRA | the term is {term / total:.1%} of the loss ({numbers})")


def log_outcome(aligner: "Aligner", history: Sequence[dict[str, float]], n_steps: int) -> None:
    """Logs at the end of a run whether MKNN rose or, if the run did not measure it, whether the alignment loss fell.

    The change is the difference between the means of the first and of the last log lines (at most five each). The
    noise is two standard errors of the change, estimated from consecutive lines, so a slow trend hardly adds to it.
    """
    if rank() > 0:
        return
    weight, memory = aligner.config.weight, aligner.memory
    lines = [line for line in history if line.get("hera_loss")]  # 0 if no sample could be compared
    key, name, sign, chance = "hera_loss", "the alignment loss", -1, ""
    if chances := [line["hera_mknn_chance"] for line in lines if "hera_mknn" in line]:
        key, name, sign = "hera_mknn", f"MKNN of the aligned {aligner.targets.plural}", 1
        chance = f", chance {np.mean(chances):.3f}"
    values = [line[key] for line in lines if key in line]
    n_held = 0 if memory.pairs is None else int(memory.pairs[2].sum())
    if len(values) >= 2:
        n = min(5, len(values) // 2)
        first, last = np.mean(values[:n]), np.mean(values[-n:])
        noise = 2 * (np.mean(np.diff(values) ** 2) / n) ** 0.5
        text = (
            f"{name} went from {first:.3f} to {last:.3f} (means of the first and the last {n} of {len(values)} log "
            f"lines; noise {noise:.3f}{chance})."
        )
        if sign * (last - first) <= noise and weight > 0:
            term = weight * lines[-1]["hera_loss"]
            share = term / (term + lines[-1].get("lm_loss", math.inf))
            remedy = f"try hera_weight: {max(0.1, 3 * weight):g}"
            if share > _LARGE_SHARE:
                remedy = f"raise the learning rate (the term is {share:.0%} of the loss, so hera_weight matters less)"
            text += (
                f" It did not {'rise' if sign > 0 else 'fall'} by more than the noise. Train longer, or {remedy} "
                "(docs/method.md#which-weight)."
            )
    elif not n_held and (n_nan := sum(line.get("hera_nan_batches", 0) for line in history)):
        text = f"the term was not finite in {n_nan:.0f} micro-batches. Lower the learning rate, or check the weights."
    elif n_held < (memory.size or 0):
        text = (
            f"the memory of {memory.size} samples did not fill up in {n_steps} steps ({n_held} entered), so hera_loss "
            "and hera_mknn were not logged. Train longer, use a larger batch, or lower hera_memory."
        )
    else:
        text = f"fewer than two log lines have {key}, so its change is unknown. Train longer, or lower logging_steps."
    logger.info(f"HeRA | {text}")


@contextmanager
def translated(translate: Callable[[str], str]) -> Iterator[None]:
    """Applies ``translate`` to the messages of errors and to the package's log messages."""

    def change(record: logging.LogRecord) -> bool:
        record.msg, record.args = translate(record.getMessage()), ()
        return True

    logger.addFilter(change)
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if error.args == (str(error),):  # skips errors such as UnicodeDecodeError
            error.args = (translate(str(error)),)
        raise
    finally:
        logger.removeFilter(change)


def in_python(message: str) -> str:
    """Rewrites keys as arguments of ``HeraConfig``, such as ``hera_pooling: text`` as ``pooling='text'``."""

    def argument(match: re.Match[str]) -> str:
        declared = HeraConfig.knobs().get(match[1])
        if declared is None:
            return match[0]
        with suppress(ValueError):  # match[2] may be a word of the sentence, not a value
            if match[2] and declared.type not in (str, str | None):
                return f"{declared.name}={typed(match[1], match[2], declared.type)!r}"
        return declared.name + match[0].removeprefix(match[1])

    return re.sub(r"\b(hera_\w+)(?:: ([\w-]+(?:\.\w+)*))?", argument, message)


def in_micro_batches(message: str) -> str:
    """Names the batch size as axolotl and LLaMA-Factory's v1 engine do."""
    return message.replace("per_device_train_batch_size", "micro_batch_size")


def compared_at_once(aligner: "Aligner", training_args: Any) -> int:
    """Returns the number of samples (or packed rows) that one step compares across all processes."""
    steps = training_args.gradient_accumulation_steps if aligner.config.gradcache else 1
    return (aligner.batch_size or training_args.per_device_train_batch_size) * world_size() * steps


def neighbors_taken(k: int, n_compared: int, remembered: int) -> int:
    """Returns the number of neighbors per sample: ``k``, but at most half of the candidates."""
    return min(k, (n_compared - 1 + remembered) // 2)


def describe_candidates(k: int, n_compared: int, remembered: int, packed: bool = False) -> str:
    """Describes how many neighbors and candidates each sample has if ``n_compared`` samples are compared at once."""
    candidates, taken = n_compared - 1 + remembered, neighbors_taken(k, n_compared, remembered)
    counted = f"{taken} of {candidates} candidates ({n_compared - 1} of the batch, {remembered} remembered)"
    counted += ", or more if packed rows contain several samples" * packed
    return counted + f"; hera_k: {k} needs {2 * k} candidates" * (taken < k)


def log_setup(aligner: "Aligner", model: "nn.Module", training_args: Any, state: Any) -> None:
    """Logs the setup of a run on the first process: heads or layers, teacher, objective, batch and candidates.

    If the resumed checkpoint already has all steps of the run, logs only a warning.
    """
    if rank() > 0:
        return
    if 0 < state.max_steps <= state.global_step:
        logger.warning(
            f"HeRA | the resumed checkpoint already has all {state.max_steps} steps of the run, so nothing is trained."
            " Raise the number of epochs or steps, or start in another folder."
        )
        return
    config, objective, decoder = aligner.config, aligner.objective, head_layout(model_config(model)).model_type
    size, steps = aligner.batch_size or 1, training_args.gradient_accumulation_steps
    micro_batch = size * world_size()
    family = f"{decoder}, {'tested' if decoder in FAMILIES else 'found by structure'}"
    lines = {
        aligner.targets.plural: f"{aligner.targets} ({family})",
        "teacher": f"{config.teacher} ({aligner.teacher.encoder.dim} values)",
        "objective": f"{config.objective}, weight {config.weight}",
        "global batch": f"{micro_batch * steps} ({world_size()} processes x {size} x {steps} accumulation steps)",
    }
    if aligner.packed:
        lines["global batch"] += ", in packed rows"
    lines |= {key.removeprefix("hera_"): f"{value:.4g}" for key, value in objective.values().items()}
    if config.reads("hera_memory"):
        n_compared = compared_at_once(aligner, training_args)
        counted = describe_candidates(config.k, n_compared, aligner.memory.size or 0, aligner.packed)
        lines["neighbors"] = counted + "; hera_mknn is logged once the memory is full" * bool(aligner.memory.size)
    for name, value in lines.items():
        logger.info(f"HeRA | {name}: {value}")
