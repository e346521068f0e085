"""Where the files of a run's model are."""

from pathlib import Path
from typing import Any


def model_folder(model_args: Any) -> Path:
    """The local folder of a model's files; of a hub model the snapshot, which is fetched with its weights.

    Raises:
        ValueError: There is no such model, or it cannot be fetched.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    name = model_args.model_name_or_path
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"model_name_or_path: {name} holds no config.json; give the folder of a whole model.")
        return Path(name)
    options = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.hf_hub_token,
    }
    try:
        for weights in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"):
            found = cached_file(name, weights, _raise_exceptions_for_missing_entries=False, **options)
            if found is not None:
                if weights.endswith(".json"):
                    get_checkpoint_shard_files(name, found, **options)
                return Path(found).parent
    except OSError as error:
        raise _missing(name, str(error)) from error
    raise _missing(name, "no weights of that name are found")


def _missing(name: str, why: str) -> ValueError:
    return ValueError(
        f"model_name_or_path: {name} is neither a folder nor a model at hand ({why}); give the folder of a model, "
        "or a hub id that can be reached or was fetched before."
    )
