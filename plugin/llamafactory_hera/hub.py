"""A model's files: a folder here or a snapshot of the hub, and whether the weights in it are whole."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
#: What a checkpoint holds beside its weights: configurations, tokenizers, templates.
TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
# In the order in which transformers prefers them; each may be cut into parts that an index names.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def local_folder(
    name_or_path: str,
    key: str,
    what: str,
    patterns: Sequence[str] = TEXT_FILES,
    weights: bool = True,
    needs: str = CONFIG_FILE,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a model: a folder as it is, or the hub's snapshot of it, whose files are of one commit.

    Args:
        name_or_path: A folder or a hub id.
        key: The config key or option to name in errors.
        what: What belongs there, for errors: "a vision model such as facebook/dinov2-large".
        patterns: Which files of a hub model are fetched beside its weights.
        weights: Fetch those that transformers would load; a folder's own are not looked at, see `weight_files`.
        needs: The file without which it is not such a model.
        revision: Of a hub model.
        cache_dir: Of the hub's client.
        token: Of the hub.

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
    if not _may_be_hub_id(value):
        raise ValueError(f"{key}: the folder {value} does not exist. {remedy}")
    hub = _HubModel(value, key, needs, revision, cache_dir, token)
    indices = [f"{name}.index.json" for name in _WEIGHTS] if weights else []
    wanted = [needs, *patterns, *indices]
    folder = hub.snapshot(wanted)
    if not (folder / needs).is_file():
        raise hub.without(needs, remedy)
    if not weights:
        return folder
    for name, index in zip(_WEIGHTS, indices, strict=True):
        parts = _parts(folder / index) if (folder / index).is_file() else [name]
        folder = hub.snapshot([*wanted, *parts])
        if all((folder / part).is_file() for part in parts):
            return folder
    raise hub.without(f"weights ({' or '.join(_WEIGHTS)})", remedy)


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would load from ``folder``.

    Raises:
        ValueError: There are none, a part that the index names is missing, or a file is not whole.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            files = [folder / name]
            break
        if (folder / f"{name}.index.json").is_file():
            files = [folder / part for part in _parts(folder / f"{name}.index.json")]
            break
    else:
        raise ValueError(f"{folder} holds no weights (looked for {' and '.join(_WEIGHTS)}, whole or with an index)")
    for file in files:
        _check_whole(file)
    return files


def _parts(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read as an index of weights ({error})") from error


def _check_whole(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file} is missing; the index in its folder names it")
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in {file.parent}")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error})") from error


def _may_be_hub_id(value: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    # An id without an owner names none of the models that are asked for: it is taken for a folder.
    if value.count("/") != 1 or value.startswith((".", "/", "~")):
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class _HubModel:
    repo: str
    key: str
    needs: str
    revision: str | None
    cache_dir: str | None
    token: str | bool | None

    def snapshot(self, patterns: Sequence[str]) -> Path:
        """The folder with all files that match; without the hub with those that its cache holds."""
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

        where: dict[str, Any] = {"revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(snapshot_download(self.repo, allow_patterns=list(patterns), token=self.token, **where))
        except GatedRepoError as error:
            raise ValueError(
                f"{self.key}: access to the hub model {self.repo} must be granted first: accept its terms on its page "
                "and log in (`hf auth login`, or HF_TOKEN), or give a local folder."
            ) from error
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"{self.key}: {self.repo} is neither a folder here nor a model on the hub. Check the spelling, or log "
                "in when the model is private."
            ) from error
        except LocalEntryNotFoundError as error:
            # Newer clients raise it when any file that matches is not cached, whether it is needed or not.
            cached = try_to_load_from_cache(self.repo, self.needs, **where)
            if isinstance(cached, str):
                return Path(cached).parents[self.needs.count("/")]
            raise self.unreachable(error) from error
        except Exception as error:  # the errors of the HTTP client have no common base
            raise self.unreachable(error) from error

    def without(self, missing: str, remedy: str) -> ValueError:
        """The error of a snapshot that lacks something: the hub does not have it, or cannot be asked for it."""
        from huggingface_hub import HfApi

        try:
            HfApi(token=self.token).model_info(self.repo, revision=self.revision)
        except Exception as error:  # as in snapshot
            return self.unreachable(error)
        return ValueError(f"{self.key}: the hub model {self.repo} holds no {missing}. {remedy}")

    def unreachable(self, error: Exception) -> ValueError:
        """The error of a model that is neither cached nor to be fetched."""
        from huggingface_hub import constants

        why = f"{constants.ENDPOINT} does not give it ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        folder = f"models/{self.repo.split('/')[1]}"
        command = f"hf download {self.repo}" + (f" --revision {self.revision}" if self.revision else "")
        place = f"give {self.key} {folder}" if self.key.startswith("--") else f"set {self.key}: {folder}"
        return ValueError(
            f"{self.key}: {self.repo} is not a folder here, {why}, and the hub cache "
            f"{self.cache_dir or constants.HF_HUB_CACHE} does not hold the whole model. On a machine with access run "
            f"`{command} --local-dir {folder}`, copy that folder here, and {place}."
        )
