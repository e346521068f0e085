"""Finds a teacher's folder: a local one, or the files of a hub model."""

from pathlib import Path

from .files import CONFIG_FILE, PROCESSOR_FILES, WEIGHT_FILES, read_json


def teacher_folder(name_or_path: str, key: str = "hera_teacher", weights: bool = True) -> Path:
    """The local folder that holds a teacher's files, fetched from the hub when ``name_or_path`` is a hub id.

    Args:
        name_or_path: A folder or a hub id such as ``facebook/dinov2-large``.
        key: The config key to name in errors.
        weights: Fetch the weights too; otherwise only that the hub has them is checked.

    Raises:
        ValueError: No such folder and no such hub model, or the hub cannot be reached and its cache does not hold
            the files.
    """
    value = str(name_or_path)
    path = Path(value).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{key}: {value} is a file; give the folder of a vision model that holds {CONFIG_FILE}.")
    if not _may_be_hub_id(value):
        raise ValueError(
            f"{key}: the folder {value} does not exist. Give the folder of a vision model or a hub id such as "
            "facebook/dinov2-large."
        )
    return _hub_folder(value, key, weights)


def _may_be_hub_id(value: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    # An id without an owner names no vision model: it is taken for a folder.
    if value.count("/") != 1:
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return not value.startswith((".", "/", "~"))


def _hub_folder(repo: str, key: str, weights: bool) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as UnknownRepoError

    try:
        config = _fetch(repo, CONFIG_FILE, None)
        if config is None:
            raise ValueError(f"{key}: the hub model {repo} holds no {CONFIG_FILE}; it is not a transformers model.")
        # The snapshot's folder is called after the commit: all other files come from the same one.
        commit = config.parent.name
        for name in PROCESSOR_FILES:
            _fetch(repo, name, commit)
        found = next((name for name in WEIGHT_FILES if _exists(repo, name, commit)), None)
        if found is None:
            raise ValueError(f"{key}: the hub model {repo} holds no weights ({', '.join(WEIGHT_FILES)}).")
        if weights:
            first = _fetch(repo, found, commit)
            if first is not None and found.endswith(".index.json"):
                for part in sorted(set(read_json(first).get("weight_map", {}).values())):
                    _fetch(repo, part, commit)
        return config.parent
    except GatedRepoError as error:
        raise ValueError(
            f"{key}: access to the hub model {repo} must be granted first: accept its terms on its page and log in "
            "(`hf auth login`, or HF_TOKEN), or give a local folder."
        ) from error
    except UnknownRepoError as error:
        raise ValueError(
            f"{key}: {repo} is neither a folder here nor a model on the hub. Check the spelling, or log in when the "
            "model is private."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise ValueError(_unreachable(repo, key)) from error


def _fetch(repo: str, name: str, commit: str | None) -> Path | None:
    """The local copy of one hub file; None when the hub says that there is no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=commit))
    except LocalEntryNotFoundError:
        # Not cached and not reachable. A file that the config does not need may really not exist, so only that
        # one is fatal; what is then missing is named by the check of the folder.
        if name in PROCESSOR_FILES:
            return None
        raise
    except EntryNotFoundError:
        return None


def _exists(repo: str, name: str, commit: str) -> bool:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(repo, name, revision=commit), str):
        return True
    try:
        return HfApi().file_exists(repo, name, revision=commit)
    except HfHubHTTPError:
        raise
    except Exception as error:
        # Offline mode and the HTTP client's own connection errors have no common base.
        raise OSError(f"the hub cannot be asked for {name} of {repo}") from error


def _unreachable(repo: str, key: str) -> str:
    from huggingface_hub import constants

    remedy = f"give {key} FOLDER" if key.startswith("--") else f"set {key}: FOLDER"
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
    return (
        f"{key}: {repo} is no folder here, {offline}, and the hub cache {constants.HF_HUB_CACHE} does not hold the "
        f"whole model. On a machine with access run `hf download {repo} {CONFIG_FILE} {PROCESSOR_FILES[0]} "
        f"{WEIGHT_FILES[0]} --local-dir FOLDER`, copy FOLDER here, and {remedy}."
    )
