"""A recipe and the overrides beside it as plain values, before the host's parser sees them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Settings that a pass without training has no use for, or under which the host would ask for more than it needs.
_NOT_TRAINING = {
    "do_train": False,
    "do_eval": False,
    "do_predict": False,
    "predict_with_generate": False,
    "plot_loss": False,
    "report_to": "none",
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "resume_from_checkpoint": None,
    "load_best_model_at_end": False,
    "tokenized_path": None,
    "packing": False,
    "neat_packing": False,
}


def read_values(
    path: str | os.PathLike | None, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a recipe and merges the overrides into it.

    Args:
        path: A YAML or JSON file as for ``llamafactory-cli train``; None when the overrides say everything.
        overrides: ``key=value`` s, as the host takes them.

    Returns:
        All keys with their values, and the overrides alone.

    Raises:
        ValueError: The file cannot be read, or an override is no ``key=value``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        if "=" not in override:
            raise ValueError(
                f"{override}: it is neither a recipe nor key=value; write for instance output_dir=saves/run."
            )
    changes = OmegaConf.from_cli(list(overrides))
    try:
        written = OmegaConf.load(Path(path)) if path is not None else OmegaConf.create({})
        values = OmegaConf.to_container(OmegaConf.merge(written, changes), resolve=True)
    except OSError as error:
        raise ValueError(f"The recipe {path} cannot be read ({error.strerror or error}).") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"The recipe {path} is no YAML that the host can read: {error}") from error
    return values, OmegaConf.to_container(changes, resolve=True)


def without_training(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe with training switched off."""
    kept = {key: value for key, value in values.items() if key not in _NOT_TRAINING}
    return kept | {key: value for key, value in _NOT_TRAINING.items() if value is not None}
