"""Finds the files of a model in a local folder or fetches them with huggingface_hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import RUN_FOLDER

#: The prefix of a value that names a repository on the hub.
HUB = "hf:"
CONFIG_FILE = "config.json"
# The files that a checkpoint needs besides its weights, and the weight formats in order of preference.
_TEXT = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "diffusion_pytorch_model*.safetensors")


def local_folder(
    name_or_path: str, key: str, example: str, weights: bool = True, needs: str = CONFIG_FILE, **hub: Any
) -> Path:
    """Returns the local folder of a model, and fetches the model from the hub if the name is not a folder.

    Without ``weights``, only small files are fetched; ``hub`` contains arguments for ``snapshot_download``. Raises
    ``ValueError`` if the model does not exist or lacks the file ``needs``; the message contains the ``key`` and an
    ``example`` of a valid value, such as "a vision model such as facebook/dinov2-large".
    """
    from huggingface_hub import snapshot_download

    folder = Path(str(name_or_path)).expanduser()
    if not folder.is_dir():
        patterns = [*_TEXT, "*.safetensors"] if weights else _TEXT
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=[needs, *patterns], **hub))
            if weights and not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(str(name_or_path), allow_patterns=[needs, *_TEXT, "*.bin"], **hub))
        except Exception as error:  # errors of the client and of its HTTP library have no common base
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{key}: {name_or_path} is not a folder and cannot be fetched from the hub ({why}). Give {example}."
            ) from error
    if not (folder / needs).is_file():
        raise ValueError(f"{key}: {name_or_path} contains no {needs}. Give {example}.")
    return folder


def fetch_first(repository: str, names: Iterable[str], key: str) -> Path:
    """Fetches the first file in ``names`` that a repository contains, at its root or in its ``hera`` folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for path in (folder + name for name in names for folder in ("", f"{RUN_FOLDER}/")):
        try:
            return Path(hf_hub_download(repository.removeprefix(HUB), path))
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{key}: {repository} cannot be fetched from the hub ({why}).") from error
    raise ValueError(f"{key}: {repository} contains no {' or '.join(names)}; give a repository with such a file.")


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder contains an adapter; raises ``ValueError`` if it also contains full weights."""
    has_adapter = (folder / "adapter_config.json").is_file()
    if has_adapter and weight_files(folder, required=False):
        raise ValueError(f"{folder} contains both an adapter and full weights; move either to another folder.")
    return has_adapter


def weight_files(folder: Path, required: bool = True) -> list[Path]:
    """Lists the weight files that transformers or diffusers would load; if there are none, raises ``ValueError``."""
    found = next((files for pattern in _WEIGHTS if (files := sorted(folder.glob(pattern)))), [])
    if required and not found:
        raise ValueError(f"{folder} contains no weights (looked for {', '.join(_WEIGHTS)})")
    return found
