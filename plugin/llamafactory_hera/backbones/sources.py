"""Reads a checkpoint tensor by tensor: where its files are, what they hold, and one tensor at a time."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..teachers.files import CONFIG_FILE, read_json, safetensors_header, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; nothing of it is in memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """Changes when the file does."""
        stat = self.file.stat()
        return f"{self.file} {stat.st_size} {stat.st_mtime_ns} {self.name}"

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self.file.suffix == ".safetensors":
            with safe_open(self.file, "pt") as opened:
                return opened.get_tensor(self.name)
        return _pickled(self.file)[self.name]


def stored_tensors(folder: Path, key: str) -> dict[str, StoredTensor]:
    """Name -> tensor of every weight file in ``folder``.

    Raises:
        ValueError: No weights, a missing shard, or a file that is not whole; names ``key``.
    """
    try:
        tensors = {}
        for file in weight_files(folder):
            for tensor in _contents(file):
                tensors[tensor.name] = tensor
        return tensors
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download {folder.name} again, whole.") from error


def _contents(file: Path) -> list[StoredTensor]:
    if file.suffix == ".safetensors":
        header, _ = safetensors_header(file)
        return [
            StoredTensor(file, name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    return [StoredTensor(file, name, tuple(t.shape), t.dtype) for name, t in _pickled(file).items()]


@lru_cache(maxsize=1)
def _pickled(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # saved before PyTorch 1.6: cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        ValueError: It has none; names ``key``.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{key}: the folder {folder} holds no {CONFIG_FILE}; give the folder of a transformers model."
        )
    return read_json(folder / CONFIG_FILE)


def language_model_folder(name_or_path: str, key: str) -> Path:
    """The local folder of a language model, fetched from the hub when ``name_or_path`` is a hub id.

    Raises:
        ValueError: Neither a folder nor a hub model, no access, or the hub is out of reach: says what to place where.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{key}: {name_or_path} is a file; give the folder of a language model.")
    if name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~")):
        raise ValueError(
            f"{key}: the folder {name_or_path} does not exist. Give the folder of a language model or a hub id such "
            "as Qwen/Qwen3-8B."
        )
    return _download(name_or_path, key)


def _download(repo: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*_TEXT_FILES, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, allow_patterns=[*_TEXT_FILES, "*.bin"]))
        return folder
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
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        folder_name = f"models/{repo.split('/')[1]}"
        raise ValueError(
            f"{key}: {repo} is no folder here, the hub cannot be reached, and its cache does not hold the model. On a "
            f"machine with access run `hf download {repo} --local-dir {folder_name}`, copy that folder here "
            f"(config.json, generation_config.json, the tokenizer's files, *.safetensors with their index), and give "
            f"{key} {folder_name}."
        ) from error
