"""What of a HeRA run is kept beside the weights, and whether a checkpoint belongs to this run."""

import os
from pathlib import Path
from typing import Any

from llamafactory.extras import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.files import read_json, write_json, write_safetensors
from llamafactory_hera.heads import Sites
from llamafactory_hera.objectives import Objective
from llamafactory_hera.training.own_parameters import OwnParameters

from .arguments import HeraArguments

logger = logging.get_logger("llamafactory.hera")  # a child of the host's logger, which has the handlers

#: Folder beside the weights, in the output folder and in each checkpoint, that holds what belongs to HeRA.
FOLDER = "hera"
STATE_FILE = "state.safetensors"
RUN_FILE = "run.json"

# What a resumed run may change, with a warning.
_SETTINGS = ("hera_weight", "hera_k", "hera_memory", "hera_accumulate", "hera_image_index")


class RunState:
    """Writes and restores heads or layers, what the objective trains with its optimizer, and memory.

    Args:
        sites: The heads or layers of the run.
        teacher_fingerprint: Of its teacher.
        arguments: The ``hera_*`` keys.
        objective: For the values that it logs.
        own: The objective's parameters.
        memory: The cross-batch memory.
    """

    def __init__(
        self,
        sites: Sites,
        teacher_fingerprint: str,
        arguments: HeraArguments,
        objective: Objective,
        own: OwnParameters,
        memory: CrossBatchMemory,
    ) -> None:
        self._sites = sites
        self._teacher_name = arguments.hera_teacher
        self._objective = objective
        self._own = own
        self._memory = memory
        self._identity = _identity(sites, teacher_fingerprint, arguments)
        self._settings = {key: getattr(arguments, key) for key in _SETTINGS}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes into ``folder/hera``; each file whole or not at all."""
        target = Path(folder) / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        state = {**self._own.state(), **self._memory.state_dict()}
        write_safetensors(target / STATE_FILE, state)
        self._sites.save(target / self._sites.FILE)
        facts = {
            **self._identity,
            **self._settings,
            "hera_teacher_name": self._teacher_name,
            **self._objective.values(),
        }
        write_json(target / RUN_FILE, facts)

    def load(self, folder: str | os.PathLike) -> None:
        """Restores what :meth:`save` wrote.

        Raises:
            ValueError: The checkpoint is not of a HeRA run, or of one that aligned something else.
        """
        _checked_facts(folder, self._identity)
        state = load_file(Path(folder) / FOLDER / STATE_FILE)
        self._own.load_state(state)
        self._memory.load_state_dict(state)


def checkpoint_of(training_args: Any) -> str | None:
    """The checkpoint that a run resumes, found as the Trainer finds it, and before weights are loaded.

    Raises:
        ValueError: There is none where one is asked for.
    """
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not asked:
        return None
    if asked is True:
        found = get_last_checkpoint(folder) if folder.is_dir() else None
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint: true, and output_dir: {folder} holds no checkpoint; give a path, or "
                "remove the key to start anew."
            )
        return found
    if not Path(asked).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: {asked} is no folder; give the path of a checkpoint, or remove it to start anew."
        )
    return asked


def check_checkpoint(
    folder: str | os.PathLike, sites: Sites, teacher_fingerprint: str, arguments: HeraArguments
) -> None:
    """Checks that a checkpoint is one of this run, before anything is loaded; warns of what may change and did.

    Raises:
        ValueError: As for :meth:`RunState.load`, or it was not saved to its end.
    """
    checkpoint = Path(folder)
    if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and not _finished(checkpoint):
        others = [path for path in checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _finished(path)]
        last = max(others, key=_step, default=None)
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {TRAINER_STATE_NAME}, which is written last: it was not saved "
            f"to its end. Remove it, and {'start anew' if last is None else f'resume {last}'}."
        )
    saved = _checked_facts(folder, _identity(sites, teacher_fingerprint, arguments))
    now = {key: getattr(arguments, key) for key in _SETTINGS}
    changed = [f"{key} was {saved[key]}, is {now[key]}" for key in now if saved.get(key, now[key]) != now[key]]
    if changed:
        logger.warning_rank0(
            f"HeRA | resume_from_checkpoint: {'; '.join(changed)}. The run goes on with the new values, so that its "
            "curves do not continue those of the checkpoint."
        )


def _finished(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE_NAME).is_file()


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _identity(sites: Sites, teacher_fingerprint: str, arguments: HeraArguments) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it."""
    return {
        "hera_objective": arguments.hera_objective,
        "hera_granularity": arguments.hera_granularity,
        sites.KEY: str(sites),
        "hera_teacher": teacher_fingerprint,
        "hera_pooling": arguments.hera_pooling,
        "hera_similarity": arguments.hera_similarity,
        # a learned one goes on from the checkpoint's value, whatever it started from
        "hera_fixed_temperature": arguments.hera_fixed_temperature and arguments.hera_temperature,
    }


def _checked_facts(folder: str | os.PathLike, now: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run; that its state is whole is seen from the file's header and length."""
    source = Path(folder) / FOLDER
    try:
        saved: dict[str, Any] = read_json(source / RUN_FILE)
        with safe_open(source / STATE_FILE, "pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds no whole {FOLDER}/ folder ({error}), so it is no checkpoint of "
            "stage: hera, or a damaged one. Resume a HeRA checkpoint, or start a new run from these weights with "
            "model_name_or_path or adapter_name_or_path."
        ) from error
    changed = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
            "Restore these settings, or start a new run."
        )
    return saved
