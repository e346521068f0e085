"""The heads or layers of a run: as written, read from a file and checked, or selected before training (``auto``)."""

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from llamafactory.model import load_config

from llamafactory_hera.alignment.gather import on_first, rank
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.files import RUN_FOLDER
from llamafactory_hera.heads.families import head_layout
from llamafactory_hera.heads.targets import AUTO, NAMED_LAYERS, Targets, file_name, named_layer
from llamafactory_hera.knobs import Role
from llamafactory_hera.selection.fingerprint import model_fingerprint
from llamafactory_hera.selection.pictures import show
from llamafactory_hera.selection.scores import differences
from llamafactory_hera.selection.select import select_targets
from llamafactory_hera.teachers.checkpoint import teacher_fingerprint, teacher_folder

from .inputs import selection_inputs
from .recipe import HostArguments, adapter_folders, model_folder

logger = logging.getLogger(__name__)


def resolve_targets(config: HeraConfig, host: HostArguments) -> Targets:
    """The heads or layers that a run aligns, for which ``auto`` becomes their names; every process calls it.

    Raises:
        ValueError: The file was selected for something else than this run, or selection is given bad input.
    """
    folder = Path(host.training.output_dir) / RUN_FOLDER
    if config.named_targets != AUTO:
        return on_first(lambda: _given(config, host, folder))
    facts = on_first(lambda: _facts(config, host))
    chosen = on_first(lambda: _selected_before(facts, config, folder, host.training.resume_from_checkpoint))
    if chosen is None:
        path = folder / file_name(config.granularity)
        with _untouched_random_state():
            own = host._replace(model=copy.deepcopy(host.model), data=copy.deepcopy(host.data))
            chosen = select_targets(selection_inputs(config, own), config, path, facts["model_fingerprint"])
        clear_device_cache(garbage_collection=True)
        if rank() == 0:
            show(path)
    setattr(host.finetuning, config.targets_key, str(chosen))
    return chosen


def _given(config: HeraConfig, host: HostArguments, folder: Path) -> Targets:
    """What the recipe names, with its scores where a selection in the output folder chose the same for this run."""
    value = config.named_targets
    if config.granularity == "layer" and value in NAMED_LAYERS:
        return named_layer(value, head_layout(load_config(host.model)))
    targets = Targets.resolve(value, config.granularity)
    if targets.provenance:
        _check(targets, _facts(config, host), Role.TRAINS, config)
        return targets
    # training writes that file anew
    path = folder / targets.file_name
    selected = Targets.load(path, config.granularity) if path.is_file() else targets
    same = selected.names == targets.names and selected.provenance
    return selected if same and not differences(selected.provenance, _facts(config, host), Role.TRAINS) else targets


def _facts(config: HeraConfig, host: HostArguments) -> dict[str, Any]:
    """What a selection made now would write, as far as runs and selections are compared by it."""
    layout, adapters = head_layout(load_config(host.model)), adapter_folders(host.model)
    return {
        **config.facts(Role.SELECTS, Role.TRAINS),
        "model": host.model.model_name_or_path,
        "teacher": config.teacher,
        "dataset": ", ".join(host.data.dataset),
        "model_fingerprint": model_fingerprint(model_folder(host.model), layout, adapters),
        "teacher_fingerprint": teacher_fingerprint(teacher_folder(config.teacher)),
    }


def _selected_before(now: dict[str, Any], config: HeraConfig, folder: Path, checkpoint: str | None) -> Targets | None:
    """What an earlier selection of the same settings chose; a resumed run takes its own or stops."""
    for place in (folder, *([Path(checkpoint) / RUN_FOLDER] if checkpoint is not None else [])):
        path = place / file_name(config.granularity)
        chosen = Targets.load(path, config.granularity) if path.is_file() else None
        if chosen is None or not chosen.provenance:
            continue
        if not differences(chosen.provenance, now, Role.SELECTS):
            logger.info(f"HeRA | {chosen.key}: {chosen} of {path}, which was selected with the same settings")
            return chosen
        if checkpoint is not None:
            _check(chosen, now, Role.SELECTS, config)
            return chosen
    return None


def _check(chosen: Targets, now: dict[str, Any], role: Role, config: HeraConfig) -> None:
    differing = differences(chosen.provenance, now, role)
    if not differing:
        return
    key, what = chosen.key, chosen.what
    problem = f"{key}: the {what} {chosen} were selected for another run: {'; '.join(differing)}"
    if config.heads_force:
        logger.warning(f"{problem}. Going on, as hera_heads_force is set.")
        return
    command = "`llamafactory-hera select`, or " if chosen.granularity == "head" else ""
    raise ValueError(
        f"{problem}. Select again ({command}{key}: auto in a new output_dir), restore these settings, or set "
        f"hera_heads_force: true to train these {what} all the same."
    )


@contextmanager
def _untouched_random_state() -> Iterator[None]:
    # training must draw the numbers that it draws when the same heads are written out
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
