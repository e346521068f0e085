"""The heads or layers of a run: as written, read from a file and checked, or selected before training (``auto``)."""

import copy
import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llamafactory.extras import logging

from llamafactory_hera.alignment.gather import from_first, rank
from llamafactory_hera.heads import HeadSet, LayerSet, Sites
from llamafactory_hera.heads.families import head_layout
from llamafactory_hera.selection.fingerprint import model_fingerprint
from llamafactory_hera.selection.provenance import SELECTED_BY, TRAINED_ON, differences
from llamafactory_hera.selection.run import FOLDER, select_heads, select_layers
from llamafactory_hera.selection.settings import SelectSettings
from llamafactory_hera.teachers.files import teacher_fingerprint
from llamafactory_hera.teachers.hub import teacher_folder

from .argument_checks import AUTO, NAMED_LAYERS
from .model_files import model_folder
from .recipe import material

logger = logging.get_logger("llamafactory.hera")  # a child of the host's logger, which has the handlers


def resolve_sites(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> Sites:
    """The heads or layers that a run aligns; every process of the launch calls it.

    Args:
        model_args: The host's arguments.
        data_args: See ``model_args``.
        training_args: See ``model_args``.
        finetuning_args: See ``model_args``; ``hera_heads`` or ``hera_layers`` becomes their names.

    Raises:
        ValueError: The heads file was selected for something else than this run, or selection is given bad input.
    """
    arguments = (model_args, data_args, training_args, finetuning_args)
    kind = LayerSet if finetuning_args.hera_granularity == "layer" else HeadSet
    value = getattr(finetuning_args, kind.KEY)
    if value in NAMED_LAYERS and kind is LayerSet:
        return _named_layer(value, model_args)
    if value == AUTO:
        selected = _selected(*arguments, kind)
        setattr(finetuning_args, kind.KEY, str(selected))
        return selected
    given = kind.resolve(value)
    if not given.provenance:  # written by hand
        return _with_provenance(given, *arguments)
    _check(given, _facts(model_args, data_args, finetuning_args), TRAINED_ON, finetuning_args)
    return given


def _named_layer(name: str, model_args: Any) -> LayerSet:
    from llamafactory.model import load_config

    n_layers = head_layout(load_config(model_args)).n_layers
    return LayerSet(({"middle": n_layers // 2, "penultimate": n_layers - 2}[name],))


def _selected(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, kind: type[HeadSet] | type[LayerSet]
) -> Any:
    """Heads or layers of an earlier selection of the same settings, or of one that is made now."""
    now = _facts(model_args, data_args, finetuning_args)
    chosen = from_first(_selected_before(now, training_args, finetuning_args, kind))
    if chosen is not None:
        return chosen
    target = Path(training_args.output_dir) / FOLDER / kind.FILE
    select = select_heads if kind is HeadSet else select_layers
    with _untouched_random_state():
        plain = material(copy.deepcopy(model_args), copy.deepcopy(data_args), training_args, finetuning_args)
        chosen = select(plain, SelectSettings.from_arguments(finetuning_args), target)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rank() == 0:
        from llamafactory_hera.selection.present import present

        present(target)
    return chosen


def _facts(model_args: Any, data_args: Any, finetuning_args: Any) -> dict[str, Any]:
    """What a selection made now would write."""
    from llamafactory.model import load_config

    folder = model_folder(model_args)
    adapters = [Path(adapter) for adapter in model_args.adapter_name_or_path or []]
    settings = SelectSettings.from_arguments(finetuning_args)
    return {
        "model": model_args.model_name_or_path,
        "teacher": finetuning_args.hera_teacher,
        "model_fingerprint": model_fingerprint(folder, head_layout(load_config(model_args)), adapters),
        "teacher_fingerprint": teacher_fingerprint(teacher_folder(finetuning_args.hera_teacher)),
        "m": settings.m,
        "dataset": ", ".join(data_args.dataset),
        "samples_asked": settings.samples,
        "mode": settings.mode,
        "k": settings.k,
        "pooling": settings.pooling,
        "similarity": settings.similarity,
        "strategy": settings.strategy,
        "seed": settings.seed,
    }


def _selected_before(
    now: dict[str, Any], training_args: Any, finetuning_args: Any, kind: type[HeadSet] | type[LayerSet]
) -> Any:
    """What an earlier selection of the same settings chose; a resumed run takes its own or stops."""
    checkpoint = training_args.resume_from_checkpoint
    folders = [Path(training_args.output_dir), *([Path(checkpoint)] if isinstance(checkpoint, str) else [])]
    for folder in folders:
        path = folder / FOLDER / kind.FILE
        if not path.is_file():
            continue
        chosen = kind.load(path)
        if chosen.provenance and not differences(chosen.provenance, now, SELECTED_BY):
            logger.info_rank0(f"HeRA | {kind.KEY}: {chosen} of {path}, which was selected with the same settings")
            return chosen
        if checkpoint is not None and chosen.provenance:
            _check(chosen, now, SELECTED_BY, finetuning_args)
            return chosen
    return None


def _check(chosen: Sites, now: dict[str, Any], keys: dict[str, str], finetuning_args: Any) -> None:
    differing = differences(chosen.provenance, now, keys)
    if not differing:
        return
    said = f"{chosen.KEY}: the {chosen.WHAT} {chosen} were selected for another run: {'; '.join(differing)}"
    if finetuning_args.hera_heads_force:
        logger.warning_rank0(f"{said}. Going on, as hera_heads_force is set.")
        return
    command = "`llamafactory-hera select`, or " if isinstance(chosen, HeadSet) else ""
    raise ValueError(
        f"{said}. Select again ({command}{chosen.KEY}: auto in a new output_dir), restore these "
        f"settings, or set hera_heads_force: true to train these {chosen.WHAT} all the same."
    )


def _with_provenance(given: Sites, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> Sites:
    """Sites written out by name, with the scores of the selection in the output folder if it chose them for this run.

    Training writes the file of its output folder anew; without this the scores would be lost.
    """
    path = Path(training_args.output_dir) / FOLDER / given.FILE
    if path.is_file():
        selected = type(given).load(path)
        if selected.names == given.names and selected.provenance:
            now = _facts(model_args, data_args, finetuning_args)
            return given if differences(selected.provenance, now, TRAINED_ON) else selected
    return given


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
