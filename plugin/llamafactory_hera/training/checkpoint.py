"""Saves and restores HeRA's state in a checkpoint, and checks that the checkpoint belongs to the run."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..config import FIXED_KEYS, RESUMABLE_KEYS, HeraConfig
from ..distributed import rank
from ..files import RUN_FOLDER, read_json, write_json, write_safetensors
from ..heads.targets import AUTO, Targets, file_name
from ..keys import changes

logger = logging.getLogger("llamafactory_hera")

_STATE_FILE = "state.safetensors"
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunIdentity:
    """The properties that a checkpoint shares with the run that resumes it."""

    targets: Targets
    teacher_fingerprint: str
    config: HeraConfig
    #: The number of trained tensors in the model; None before the model is loaded.
    n_trained: int | None = None

    def save(self, folder: str | os.PathLike, state: dict[str, Tensor], values: dict[str, float]) -> None:
        """Writes ``folder/hera``: tensors, targets, keys, identity, and ``values`` for human readers."""
        path = Path(folder) / RUN_FOLDER
        write_safetensors(path / _STATE_FILE, state)
        self.targets.save(path / file_name(self.targets.granularity))
        keys = self.config.keys()
        write_json(path / _RUN_FILE, {**keys, **self._described(), "hera_teacher_name": self.config.teacher, **values})

    def load(self, folder: str | os.PathLike) -> dict[str, Tensor]:
        """Checks a checkpoint, warns about permitted changes of keys, and reads the saved tensors."""
        now = self.config.keys()
        names = [key for key in RESUMABLE_KEYS if now[key] != AUTO]  # auto keeps the value of the checkpoint
        changed = changes(self.check(folder), now, names)
        if changed and rank() == 0:
            logger.warning(
                f"HeRA | resume_from_checkpoint: {'; '.join(changed)}. The run continues with the new values, so its "
                "curves do not continue those of the checkpoint."
            )
        return load_file(Path(folder) / RUN_FOLDER / _STATE_FILE)

    def check(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Reads a checkpoint's keys; raises ``ValueError`` if it is incomplete or belongs to a different run."""
        checkpoint = Path(folder)
        if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and not (checkpoint / TRAINER_STATE_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {folder} is incomplete: {TRAINER_STATE_NAME}, which is saved last, is "
                "missing. Remove the folder, then resume from an earlier checkpoint or start from the beginning."
            )
        remedy = "resume from an undamaged checkpoint of a HeRA run, or start a new run from these weights"
        saved = _saved_keys(folder, "resume_from_checkpoint", remedy)
        identity = self._described()
        if changed := changes(dict.fromkeys(identity) | saved, identity, identity):
            raise ValueError(
                f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
                "Restore the old settings, or start a new run."
            )
        return saved

    def _described(self) -> dict[str, Any]:
        keys = self.config.keys()
        return {
            **{key: keys[key] for key in FIXED_KEYS},
            self.targets.key: str(self.targets),
            "hera_teacher": self.teacher_fingerprint,
            **({} if self.n_trained is None else {"trained_tensors": self.n_trained}),
        }


def earlier_values(config: HeraConfig) -> dict[str, Tensor]:
    """Reads the tensors that an earlier run with the same objective saved in the folder ``hera_objective_from``."""
    folder = str(config.objective_from)
    remedy = "give the output folder of a HeRA run, or one of its checkpoints"
    saved = _saved_keys(folder, "hera_objective_from", remedy)
    if changed := changes(saved, config.keys(), ("hera_objective", "hera_granularity", "hera_projector")):
        raise ValueError(
            f"hera_objective_from: the run in {folder} has other settings: {'; '.join(changed)}; give a run with the "
            "same settings."
        )
    return load_file(Path(folder) / RUN_FOLDER / _STATE_FILE)


def _saved_keys(folder: str | os.PathLike, key: str, remedy: str) -> dict[str, Any]:
    """Reads the keys of the run that wrote a folder; raises ``ValueError`` if a file is missing or damaged."""
    hera = Path(folder) / RUN_FOLDER
    try:
        saved: dict[str, Any] = dict(read_json(hera / _RUN_FILE))
        with safe_open(hera / _STATE_FILE, "pt"):  # detects a truncated file by the sizes in its header
            return saved
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"{key}: {folder} has no complete {RUN_FOLDER}/ folder ({error}); {remedy}.") from error


def checkpoint_of(training_args: Any) -> str | None:
    """Finds the checkpoint to resume from, as the Trainer does; raises ``ValueError`` if it does not exist."""
    requested, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not requested or str(requested).lower() == "false":
        return None
    if str(requested).lower() == "true":
        requested = (get_last_checkpoint(folder) if folder.is_dir() else None) or folder / f"{PREFIX_CHECKPOINT_DIR}-*"
    if not Path(requested).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: {requested} does not exist; set the key to a checkpoint's path, or remove it to "
            "start from the beginning."
        )
    return str(requested)


def load_renamed_weights(model: nn.Module, checkpoint: str | os.PathLike) -> bool:
    """Loads a full checkpoint through ``from_pretrained`` if its tensor names differ from the model's.

    When transformers 5 saves some multimodal models, it renames their tensors (LLaVA: ``model.language_model.…``
    becomes ``language_model.model.…``). The Trainer then loads none and only warns (seen with 5.6.0, in plain SFT).
    Returns False if the Trainer can load the checkpoint, because the names match or no file is in safetensors format.
    Raises ``ValueError`` if the checkpoint lacks weights of the model; the Trainer would only warn and keep training.
    """
    adapter = isinstance(model, PeftModel)
    names: set[str] = set()
    for path in Path(checkpoint).glob("adapter_model.safetensors" if adapter else "model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    if not names:
        return False
    state = get_peft_model_state_dict(model, save_embedding_layers=False) if adapter else model.state_dict()
    renamed = not (adapter or names <= state.keys())
    if renamed:
        # A model may mix dtypes. fp32 represents all values exactly, and load_state_dict casts each parameter.
        saved, found = type(model).from_pretrained(  # type: ignore[attr-defined]
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
        missing = found["missing_keys"]
    else:
        held = {state[name].data_ptr() for name in names & state.keys()}  # tied weights are saved once
        held_by_name = names.union(getattr(model, "_keys_to_ignore_on_save", None) or ())
        missing = {name for name, value in state.items() if name not in held_by_name and value.data_ptr() not in held}
    if missing:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} lacks {len(missing)} tensors of the model, such as {min(missing)}; "
            "resume from an undamaged checkpoint, or start a new run."
        )
    if renamed:
        model.load_state_dict(saved.state_dict())
    return renamed
