"""What of a run is kept beside the weights, and whether a checkpoint belongs to the run that resumes it."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..alignment.gather import rank
from ..config import HeraConfig
from ..files import RUN_FOLDER, read_json, write_json, write_safetensors
from ..heads import Targets
from ..knobs import Role
from ..objectives import find

logger = logging.getLogger("llamafactory_hera")

_STATE_FILE = "state.safetensors"
_RUN_FILE = "run.json"
_TRAINED = "trained_tensors"
_ADAPTERS = {kind.value.lower() for kind in PeftType}


def save_state(
    folder: str | os.PathLike,
    state: dict[str, Tensor],
    targets: Targets,
    teacher_fingerprint: str,
    config: HeraConfig,
    n_trained: int,
    values: dict[str, float],
) -> None:
    """Writes ``folder/hera``: tensors, targets with their provenance, and the facts that a resumed run must share."""
    target = Path(folder) / RUN_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / _STATE_FILE, state)
    targets.save(target / targets.file_name)
    facts = _identity(targets, teacher_fingerprint, config) | config.with_role(Role.RESUMABLE)
    write_json(target / _RUN_FILE, {**facts, "hera_teacher_name": config.teacher, _TRAINED: n_trained, **values})


def load_state(
    folder: str | os.PathLike, targets: Targets, teacher_fingerprint: str, config: HeraConfig, n_trained: int
) -> dict[str, Tensor]:
    """The tensors that :func:`save_state` wrote; refuses a checkpoint of another run, warns of what may change."""
    saved = _checked_facts(folder, _identity(targets, teacher_fingerprint, config))
    if (was := saved.get(_TRAINED, n_trained)) != n_trained:
        _refuse(folder, [f"finetuning_type trained {was} tensors of the model, trains {n_trained}"])
    changed = _differences(saved, config.with_role(Role.RESUMABLE), where_known=True)
    if changed and rank() == 0:
        logger.warning(
            f"HeRA | resume_from_checkpoint: {'; '.join(changed)}. The run goes on with the new values, so that its "
            "curves do not continue those of the checkpoint."
        )
    return load_file(Path(folder) / RUN_FOLDER / _STATE_FILE)


def earlier_values(config: HeraConfig) -> dict[str, Tensor]:
    """The tensors that an earlier run of the same objective left in the folder of ``hera_own_from``."""
    source = Path(str(config.own_from)) / RUN_FOLDER
    try:
        saved, values = read_json(source / _RUN_FILE), load_file(source / _STATE_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"hera_own_from: {config.own_from} holds no whole {RUN_FOLDER}/ folder ({error}); give the output_dir "
            "of a run with HeRA, or one of its checkpoints."
        ) from error
    same = ("hera_objective", "view", "hera_granularity", "hera_projector")
    now = {**config.with_role(Role.FIXED), "view": find(config.objective).view}
    if changed := _differences(saved, {key: now[key] for key in same}):
        raise ValueError(
            f"hera_own_from: {config.own_from} is another kind of run: {'; '.join(changed)}; give one of the same."
        )
    return values


def checkpoint_of(training_args: Any) -> str | None:
    """The checkpoint that a run resumes, found as the Trainer finds it, and before weights are loaded."""
    asked, folder = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() == "true":
        found = get_last_checkpoint(folder) if folder.is_dir() else None
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint: true, and output_dir: {folder} holds no checkpoint; give a path, or "
                "remove the key to start anew."
            )
        return found
    if not Path(asked).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: {asked} is not a folder; give the path of a checkpoint, or remove it to start "
            "anew."
        )
    return asked


def check_checkpoint(
    folder: str | os.PathLike, targets: Targets, teacher_fingerprint: str, config: HeraConfig
) -> None:
    """Refuses a checkpoint of another run, or half saved, before anything is loaded."""
    checkpoint = Path(folder)
    if checkpoint.name.startswith(PREFIX_CHECKPOINT_DIR) and not (checkpoint / TRAINER_STATE_NAME).is_file():
        finished = checkpoint.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")
        last = max((file.parent for file in finished), key=checkpoint_step, default=None)
        raise ValueError(
            f"resume_from_checkpoint: {folder} has no {TRAINER_STATE_NAME}, which is written last: it was not saved "
            f"to its end. Remove it, and {'start anew' if last is None else f'resume {last}'}."
        )
    _checked_facts(folder, _identity(targets, teacher_fingerprint, config))


def check_tuning(folder: str | os.PathLike, kind: str, **settings: Any) -> None:
    """Refuses a checkpoint of another kind of training, whose weights would be left out or not fit.

    Args:
        folder: The checkpoint.
        kind: ``lora``, ``oft`` or another adapter of PEFT; anything else trains the model's own weights.
        settings: ``lora_rank`` and ``use_dora``, which are compared under LoRA.
    """
    files = [*Path(folder).glob("adapter_config.json"), *Path(folder).glob("*/adapter_config.json")]
    if not files and not any(Path(folder).glob("model*.safetensors")):
        return  # an engine's own files
    saved = read_json(files[0]) if files else {}
    was: dict[str, Any] = {"finetuning_type": str(saved.get("peft_type", "full")).lower()}
    now: dict[str, Any] = {"finetuning_type": kind if kind in _ADAPTERS else "full"}
    if was == now == {"finetuning_type": "lora"}:
        was |= {"lora_rank": saved.get("r"), "use_dora": saved.get("use_dora", False)}
        now |= settings
    _refuse(folder, _differences(was, now))


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """The step after which the Trainer saved a folder, by its name; -1 for another one's."""
    step = Path(checkpoint).name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _identity(targets: Targets, teacher_fingerprint: str, config: HeraConfig) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that resumes it."""
    return {
        **config.with_role(Role.FIXED),
        "view": find(config.objective).view,  # the same name meant another objective once
        targets.key: str(targets),
        "hera_teacher": teacher_fingerprint,
        # a learned one goes on from the checkpoint's value, whatever it started from
        "hera_fixed_temperature": config.fixed_temperature and config.temperature,
    }


def _differences(saved: dict[str, Any], now: dict[str, Any], where_known: bool = False) -> list[str]:
    return [
        f"{key} was {saved.get(key)}, is {value}"
        for key, value in now.items()
        if saved.get(key, value if where_known else None) != value
    ]


def _checked_facts(folder: str | os.PathLike, now: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its run; that its state is whole is seen from the file's header and length."""
    source = Path(folder) / RUN_FOLDER
    try:
        saved: dict[str, Any] = read_json(source / _RUN_FILE)
        if not isinstance(saved, dict):
            raise ValueError(f"{source / _RUN_FILE} does not hold a JSON object")
        with safe_open(source / _STATE_FILE, "pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {folder} holds no whole {RUN_FOLDER}/ folder ({error}), so it is not a "
            "checkpoint of stage: hera, or a damaged one. Resume a HeRA checkpoint, or start a new run from these "
            "weights with model_name_or_path or adapter_name_or_path."
        ) from error
    _refuse(folder, _differences(saved, now))
    return saved


def _refuse(folder: str | os.PathLike, changed: list[str]) -> None:
    if changed:
        raise ValueError(
            f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
            "Restore these settings, or start a new run."
        )


# -- weights whose names changed -------------------------------------------------------------------------------------


def load_renamed_weights(model: nn.Module, checkpoint: str | os.PathLike) -> bool:
    """Loads a full checkpoint through ``from_pretrained``, which renames tensors, where names differ from the model's.

    transformers 5 renames the tensors of some multimodal models when it saves them (LLaVA: ``model.language_model.…``
    becomes ``language_model.model.…``), and its Trainer loads a checkpoint without renaming them back: nothing is
    loaded, with a warning only, and the run goes on from the initial weights (seen with 5.6.0, also for plain SFT).

    Returns:
        False where the Trainer's own way does: no ``model.safetensors`` or shards of it, or the names agree.
    """
    names: set[str] = set()
    for path in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {*file.keys()}
    if not names or names <= model.state_dict().keys():
        return False
    # models mix types, and fp32 holds each value of all of them; what is loaded is cast parameter by parameter
    saved = type(model).from_pretrained(checkpoint, dtype=torch.float32)  # type: ignore[attr-defined]
    model.load_state_dict(saved.state_dict())
    return True
