"""The heads or layers of a run: named in its settings, read from a file, or selected before training (``auto``)."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from ..config import HeraConfig, selection_keys
from ..distributed import on_first, rank
from ..files import RUN_FOLDER
from ..heads.families import HeadLayout
from ..heads.targets import AUTO, Targets, file_name
from ..teachers.encoder import teacher_fingerprint, teacher_folder
from .report import show
from .samples import SelectionInputs
from .scores import SAME_RUN, SAME_SELECTION, differences
from .select import select_targets

logger = logging.getLogger("llamafactory_hera")


@dataclass(frozen=True)
class Run:
    """A run that asks for its heads or layers, as an integration provides it."""

    output_dir: Path
    layout: HeadLayout
    origin: Callable[[], dict[str, str]]  #: Returns ``model``, ``model_fingerprint`` and ``dataset``.
    inputs: Callable[[], SelectionInputs]
    checkpoint: str | None = None  #: The checkpoint that the run resumes.


def resolve_targets(config: HeraConfig, run: Run) -> Targets:
    """Returns the heads or layers that a run aligns; every process calls it, and the random state stays as it is.

    Raises:
        ValueError: The file was selected for another run, or the input of a selection is bad.
    """
    folder = run.output_dir / RUN_FOLDER
    with untouched_random_state():
        if config.named_targets != AUTO:
            return on_first(lambda: _named(config, run, folder))
        now = on_first(lambda: _origin(config, run))
        chosen = on_first(lambda: _selected_before(now, config, folder, run.checkpoint))
        if chosen is None:
            path = folder / file_name(config.granularity)
            chosen = select_targets(run.inputs(), config, path, now["model_fingerprint"])
            clear_device_cache(garbage_collection=True)
            if rank() == 0:
                show(path)
    return chosen


def _named(config: HeraConfig, run: Run, folder: Path) -> Targets:
    """The targets that the key names; with scores, if a selection in the output folder chose them for this run."""
    targets = Targets.parse(config.named_targets, config.granularity, run.layout)
    if targets.provenance:
        _check(targets, _origin(config, run), SAME_RUN, config)
        return targets
    path = folder / targets.file_name  # training writes this file again, and would lose the scores
    selected = Targets.load(path, config.granularity) if path.is_file() else targets
    same = selected.names == targets.names and selected.provenance
    return selected if same and not differences(selected.provenance, _origin(config, run), SAME_RUN) else targets


def _origin(config: HeraConfig, run: Run) -> dict[str, Any]:
    """The provenance that a selection for this run would write, as far as it is compared."""
    return {
        "keys": selection_keys(config),
        **run.origin(),
        "teacher": config.teacher,
        "teacher_fingerprint": teacher_fingerprint(teacher_folder(config.teacher)),
    }


def _selected_before(now: dict[str, Any], config: HeraConfig, folder: Path, checkpoint: str | None) -> Targets | None:
    """The choice of an earlier selection with the same settings; a resumed run takes its checkpoint's, or stops."""
    for place in ([] if checkpoint is None else [Path(checkpoint) / RUN_FOLDER]) + [folder]:
        path = place / file_name(config.granularity)
        chosen = Targets.load(path, config.granularity) if path.is_file() else None
        if chosen is None or not chosen.provenance:
            continue
        if not differences(chosen.provenance, now, SAME_SELECTION):
            logger.info(f"HeRA | {chosen.key}: {chosen} from {path}, which was selected with the same settings")
            return chosen
        if checkpoint is not None:
            _check(chosen, now, SAME_SELECTION, config)
            return chosen
    return None


def _check(chosen: Targets, now: dict[str, Any], names: tuple[str, ...], config: HeraConfig) -> None:
    if not (differing := differences(chosen.provenance, now, names)):
        return
    key, what = chosen.key, chosen.what
    problem = f"{key}: the {what} {chosen} were selected for another run: {'; '.join(differing)}"
    if config.heads_force:
        logger.warning(f"{problem}. Going on, as hera_heads_force is set.")
        return
    command = "`llamafactory-hera select`, or " if chosen.granularity == "head" else ""
    raise ValueError(
        f"{problem}. Select again ({command}{key}: auto in a new output folder), restore these settings, or set "
        f"hera_heads_force: true to train these {what} anyway."
    )


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the random state, so that training draws the same numbers as with heads that are written by hand."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # only of the current device, as PyTorch warns about forking the state of several
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
