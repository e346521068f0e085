"""Saving and restoring HeRA's state beside a checkpoint, and checking that a checkpoint matches the run."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..config import FIXED_KEYS, RESUMABLE_KEYS, HeraConfig
from ..distributed import rank
from ..files import RUN_FOLDER, read_json, write_json, write_safetensors
from ..heads.targets import Targets, file_name
from ..keys import changes

logger = logging.getLogger("llamafactory_hera")

_STATE_FILE = "state.safetensors"
_RUN_FILE = "run.json"
_TRAINED = "trained_tensors"


def save_state(
    folder: str | os.PathLike,
    state: dict[str, Tensor],
    targets: Targets,
    teacher_fingerprint: str,
    config: HeraConfig,
    n_trained: int,
    values: dict[str, float],
) -> None:
    """Writes ``folder/hera``: the tensors, the targets with their provenance, and what a resumed run must share.

    ``n_trained`` counts the tensors of the model that are trained, and ``values`` are those of the objective, for
    people who read the file.
    """
    path = Path(folder) / RUN_FOLDER
    write_safetensors(path / _STATE_FILE, state)
    targets.save(path / file_name(targets.granularity))
    run = _identity(targets, teacher_fingerprint, config, n_trained)
    write_json(path / _RUN_FILE, {**config.keys(), **run, "hera_teacher_name": config.teacher, **values})


def load_state(
    folder: str | os.PathLike, targets: Targets, teacher_fingerprint: str, config: HeraConfig, n_trained: int
) -> dict[str, Tensor]:
    """Reads the tensors that :func:`save_state` wrote; errors as for :func:`check_checkpoint`.

    Keys that may change only cause a warning.
    """
    saved = check_checkpoint(folder, targets, teacher_fingerprint, config, n_trained)
    changed = changes(saved, config.keys(), RESUMABLE_KEYS)
    if changed and rank() == 0:
        logger.warning(
            f"HeRA | resume_from_checkpoint: {'; '.join(changed)}. The run continues with the new values, so its "
            "curves do not continue those of the checkpoint."
        )
    return load_file(Path(folder) / RUN_FOLDER / _STATE_FILE)


def earlier_values(config: HeraConfig) -> dict[str, Tensor]:
    """Reads the tensors that an earlier run of the same objective left in the folder of ``hera_objective_from``."""
    folder = Path(str(config.objective_from)) / RUN_FOLDER
    try:
        saved, values = read_json(folder / _RUN_FILE), load_file(folder / _STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"hera_objective_from: {config.objective_from} holds no complete {RUN_FOLDER}/ folder ({error}); give the "
            "output folder of a run with HeRA, or one of its checkpoints."
        ) from error
    if changed := changes(saved, config.keys(), ("hera_objective", "hera_granularity", "hera_projector")):
        raise ValueError(
            f"hera_objective_from: {config.objective_from} is another kind of run: {'; '.join(changed)}; give one "
            "with the same settings."
        )
    return values


def checkpoint_of(training_args: Any) -> str | None:
    """Finds the checkpoint that a run resumes, as the Trainer does, but before weights are loaded.

    Raises:
        ValueError: There is no such checkpoint.
    """
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() == "true":
        asked = (get_last_checkpoint(folder) if folder.is_dir() else None) or folder / f"{PREFIX_CHECKPOINT_DIR}-*"
    if not Path(asked).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: {asked} does not exist; give the path of a checkpoint, or remove the key to "
            "start from the beginning."
        )
    return str(asked)


def check_checkpoint(
    folder: str | os.PathLike,
    targets: Targets,
    teacher_fingerprint: str,
    config: HeraConfig,
    n_trained: int | None = None,
) -> dict[str, Any]:
    """Reads the keys of the run that wrote a checkpoint; arguments as for :func:`save_state`.

    Raises:
        ValueError: The checkpoint is incomplete, or belongs to another run; names what differs and the remedy.
    """
    checkpoint, hera = Path(folder), Path(folder) / RUN_FOLDER
    if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and not (checkpoint / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"resume_from_checkpoint: {folder} is incomplete: {TRAINER_STATE_NAME}, which is saved last, is missing. "
            "Remove the folder, and resume an earlier checkpoint or start from the beginning."
        )
    try:
        saved: dict[str, Any] = dict(read_json(hera / _RUN_FILE))
        with safe_open(hera / _STATE_FILE, "pt"):  # the header tells the length that the file must have
            pass
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds no complete {RUN_FOLDER}/ folder ({error}), so it was saved "
            "without HeRA, or is damaged. Resume a checkpoint with HeRA, or start a new run from its weights."
        ) from error
    identity = _identity(targets, teacher_fingerprint, config, n_trained)
    if changed := changes(dict.fromkeys(identity) | saved, identity, identity):
        raise ValueError(
            f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
            "Restore these settings, or start a new run."
        )
    return saved


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """Reads the step from the name of a checkpoint folder; -1 if it does not tell."""
    step = Path(checkpoint).name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _identity(targets: Targets, teacher_fingerprint: str, config: HeraConfig, n_trained: int | None) -> dict[str, Any]:
    """Lists what must not change between a checkpoint and the run that resumes it."""
    keys = config.keys()
    return {
        **{key: keys[key] for key in FIXED_KEYS},
        targets.key: str(targets),
        "hera_teacher": teacher_fingerprint,
        # a learned temperature continues from the checkpoint's, whatever it started from
        "hera_fixed_temperature": config.fixed_temperature and config.temperature,
        **({} if n_trained is None else {_TRAINED: n_trained}),
    }


# -- weights whose names changed -------------------------------------------------------------------------------------


def load_renamed_weights(model: nn.Module, checkpoint: str | os.PathLike) -> bool:
    """Loads a full checkpoint through ``from_pretrained`` if its tensor names differ from the model's.

    transformers 5 renames the tensors of some multimodal models when it saves them (LLaVA: ``model.language_model.…``
    becomes ``language_model.model.…``), and its Trainer does not rename them back when it loads a checkpoint. It then
    loads nothing, warns, and continues from the initial weights (seen with 5.6.0, also in plain SFT).

    Returns:
        False if the Trainer can load it: there is no ``model.safetensors``, or the names agree.
    """
    names: set[str] = set()
    for path in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    if not names or names <= model.state_dict().keys():
        return False
    # Models mix types. fp32 holds each value of all of them, and load_state_dict casts parameter by parameter.
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)  # type: ignore[attr-defined]
    model.load_state_dict(saved.state_dict())
    return True
