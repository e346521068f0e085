"""A model's files: a folder here or a snapshot of the hub, and whether the weights in it are whole."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import read_json

CONFIG_FILE = "config.json"
#: What a checkpoint holds beside its weights: configurations, tokenizers, templates.
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# In the order in which transformers prefers them, then diffusers'; each may be cut into parts that an index names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")


def local_folder(
    name_or_path: str,
    key: str,
    what: str,
    patterns: Sequence[str] = TEXT_FILES,
    weights: bool = True,
    needs: str = CONFIG_FILE,
    **hub: Any,
) -> Path:
    """The local folder of a model: a folder as it is, or the hub's snapshot of it, whose files are of one commit.

    Args:
        name_or_path: A folder or a hub id.
        key: The config key or option to name in errors.
        what: What belongs there, for errors: "a vision model such as facebook/dinov2-large".
        patterns: Which files of a hub model are fetched beside its weights.
        weights: Fetch those that transformers or diffusers would load; a folder's own are not looked at, see
            `weight_files`.
        needs: The file without which it is not such a model.
        **hub: ``revision``, ``cache_dir`` and ``token`` of the hub's client.

    Raises:
        ValueError: Names ``key``, the value and the remedy: neither a folder nor a hub model, no access, the hub out
            of reach while its cache does not hold the files, or ``needs`` or the weights are not there.
    """
    value = str(name_or_path)
    path = Path(value).expanduser()
    remedy = f"Give the folder or the hub id of {what}."
    if path.is_dir():
        if not (path / needs).is_file():
            raise ValueError(f"{key}: the folder {value} holds no {needs}. {remedy}")
        return path
    if path.exists():
        raise ValueError(f"{key}: {value} is a file. {remedy}")
    # An id without an owner names none of the models that are asked for: it is taken for a folder.
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", value, re.ASCII):
        raise ValueError(f"{key}: the folder {value} does not exist. {remedy}")
    indices = [f"{name}.index.json" for name in _WEIGHTS] if weights else []
    wanted = [needs, *patterns, *indices]
    folder = _snapshot(value, key, needs, wanted, hub)
    missing = needs
    if (folder / needs).is_file():
        if not weights:
            return folder
        for name, index in zip(_WEIGHTS, indices, strict=True):
            parts = _parts(folder / index) if (folder / index).is_file() else [name]
            folder = _snapshot(value, key, needs, [*wanted, *parts], hub)
            if all((folder / part).is_file() for part in parts):
                return folder
        missing = f"weights ({' or '.join(_WEIGHTS)})"
    from huggingface_hub import HfApi

    try:  # the hub does not have it, or cannot be asked for it
        HfApi(token=hub.get("token")).model_info(value, revision=hub.get("revision"))
    except Exception as error:  # as in _snapshot
        raise _unreachable(value, key, error, hub) from error
    raise ValueError(f"{key}: the hub model {value} holds no {missing}. {remedy}")


def _snapshot(repo: str, key: str, needs: str, patterns: Sequence[str], hub: dict[str, Any]) -> Path:
    """The folder with all files that match; without the hub with those that its cache holds."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), **hub))
    except GatedRepoError as error:
        raise ValueError(
            f"{key}: access to the hub model {repo} must be granted first: accept its terms on its page and log in "
            "(`hf auth login`, or HF_TOKEN), or give a local folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{key}: {repo} is neither a folder here nor a model on the hub. Check the spelling, or log in when the "
            "model is private."
        ) from error
    except Exception as error:  # the errors of the HTTP client have no common base
        # Newer clients raise it when any file that matches is not cached, whether it is needed or not.
        if isinstance(error, LocalEntryNotFoundError):
            cached = try_to_load_from_cache(repo, needs, hub.get("cache_dir"), hub.get("revision"))
            if isinstance(cached, str):
                return Path(cached).parents[needs.count("/")]
        raise _unreachable(repo, key, error, hub) from error


def _unreachable(repo: str, key: str, error: Exception, hub: dict[str, Any]) -> ValueError:
    """The error of a model that is neither cached nor to be fetched."""
    from huggingface_hub import constants

    why = f"{constants.ENDPOINT} does not give it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    folder = f"models/{repo.split('/')[1]}"
    command = f"hf download {repo}" + (f" --revision {hub['revision']}" if hub.get("revision") else "")
    place = f"set {key}: {folder}"
    if key.startswith("--") or key == "MODEL":
        place = f"give {folder if key == 'MODEL' else f'{key} {folder}'}"
    cache = hub.get("cache_dir") or constants.HF_HUB_CACHE
    return ValueError(
        f"{key}: {repo} is not a folder here, {why}, and the hub cache {cache} does not hold the whole model. On a "
        f"machine with access run `{command} --local-dir {folder}`, copy that folder here, and {place}."
    )


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers or diffusers would load from ``folder``.

    Raises:
        ValueError: There are none, a part that the index names is missing, or a file is not whole.
    """
    from safetensors import SafetensorError, safe_open

    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file() or index.is_file():
            files = [folder / part for part in ([name] if (folder / name).is_file() else _parts(index))]
            break
    else:
        raise ValueError(f"{folder} holds no weights (looked for {' and '.join(_WEIGHTS)}, whole or with an index)")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing; the index in its folder names it")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "np"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is not a whole safetensors file ({error}); if it is a git-lfs pointer, run `git lfs pull`"
                ) from error
    return files


def _parts(index: Path) -> list[str]:
    try:
        parts = sorted(set(read_json(index)["weight_map"].values()))
        if outside := [part for part in parts if Path(part).name != part]:
            raise ValueError(f"{outside[0]} lies outside of its folder")
        return parts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights ({error})") from error
