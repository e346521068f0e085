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
from ..heads.targets import AUTO, Targets, file_name
from ..teachers.encoder import teacher_fingerprint, teacher_folder
from .report import show
from .samples import SelectionInputs
from .scores import SAME_RUN, SAME_SELECTION, differences
from .select import select_targets

logger = logging.getLogger("llamafactory_hera")


@dataclass(frozen=True)
class Run:
    """A training run that needs its heads or layers, as an integration describes it."""

    output_dir: Path
    configuration: Any  #: The configuration of the model.
    origin: Callable[[], dict[str, str]]  #: Returns ``model``, ``model_fingerprint`` and ``dataset``.
    inputs: Callable[[], SelectionInputs]
    checkpoint: str | None = None  #: The checkpoint that the run resumes.


def resolve_targets(config: HeraConfig, run: Run) -> Targets:
    """Returns the heads or layers that a run aligns. All processes call it, and the random state does not change."""
    folder = run.output_dir / RUN_FOLDER
    with untouched_random_state():
        if config.named_targets != AUTO:
            return on_first(lambda: _named(config, run, folder))
        chosen = on_first(lambda: _selected_before(config, run, folder))
        if chosen is None:
            path = folder / file_name(config.granularity)
            chosen = select_targets(run.inputs(), config, path)
            clear_device_cache(garbage_collection=True)
            if rank() == 0:
                show(path)
    return chosen


def _named(config: HeraConfig, run: Run, folder: Path) -> Targets:
    """Returns the targets that the key names, with their scores if a selection for this run chose the same ones."""
    targets = Targets.parse(config.named_targets, config.granularity, run.configuration)
    if targets.provenance:
        _check(targets, differences(targets.provenance, _origin(config, run), SAME_RUN), config)
        return targets
    path = folder / file_name(config.granularity)  # training rewrites this file, and would otherwise lose the scores
    selected = Targets.load(path, config.granularity) if path.is_file() else targets
    same = selected.names == targets.names and selected.provenance
    return selected if same and not differences(selected.provenance, _origin(config, run), SAME_RUN) else targets


def _origin(config: HeraConfig, run: Run) -> dict[str, Any]:
    """Returns this run's entries of the provenance, for the comparison with an earlier selection."""
    digest = teacher_fingerprint(teacher_folder(config.teacher))
    keys = {"keys": selection_keys(config), "teacher": config.teacher, "teacher_fingerprint": digest}
    return keys | run.origin()


def _selected_before(config: HeraConfig, run: Run, folder: Path) -> Targets | None:
    """Returns an earlier selection's choice with the same settings; a resumed run uses its checkpoint's choice."""
    now, checkpoint = _origin(config, run), run.checkpoint
    for place in [folder] if checkpoint is None else [Path(checkpoint) / RUN_FOLDER, folder]:
        path = place / file_name(config.granularity)
        chosen = Targets.load(path, config.granularity) if path.is_file() else None
        if chosen is not None and chosen.provenance:
            differing = differences(chosen.provenance, now, SAME_SELECTION)
            if not differing:
                logger.info(f"HeRA | {chosen.key}: {chosen} from {path}, selected with the same settings")
            if checkpoint is not None or not differing:
                _check(chosen, differing, config, checkpoint is not None)
                return chosen
    if checkpoint is not None:
        lack = f"{checkpoint} has no selected {config.granularity}s to continue with"
        remedy = f"resume a checkpoint of a run with HeRA, or name its {config.granularity}s in {config.targets_key}"
        raise ValueError(f"resume_from_checkpoint: {lack}; {remedy}.")
    return None


def _check(chosen: Targets, differing: list[str], config: HeraConfig, resumed: bool = False) -> None:
    problem = f"{chosen.key}: the {chosen.plural} {chosen} were selected for another run: {'; '.join(differing)}"
    if differing and not config.heads_force:
        remedy = "Select again in a new output folder, or set hera_heads_force: true"
        raise ValueError(f"{problem}. {'Restore these settings, or start a new run' if resumed else remedy}.")
    if differing:
        logger.warning(f"{problem}. Continuing, because hera_heads_force is set.")


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the random state, so training draws the same random numbers as with heads named in the settings."""
    python, numpy_state = random.getstate(), np.random.get_state()
    # forks only the state of the current device, because PyTorch warns about forking the states of several devices
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
