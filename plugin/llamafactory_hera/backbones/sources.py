"""Reads a checkpoint tensor by tensor: where its files are, what they hold, and one tensor at a time."""

from collections.abc import Iterator
from contextlib import ExitStack
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
_BLOCK_ROWS = 4096
# As the first releases of AutoGPTQ and AutoAWQ wrote them, without a word in the model's own configuration.
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")
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

    def equals(self, other: "StoredTensor") -> bool:
        """Same shape and values; at most a few thousand rows of each are in memory."""
        if self.shape != other.shape:
            return False
        pairs = zip(self._blocks(), other._blocks(), strict=True)
        return all(torch.equal(ours, theirs) for ours, theirs in pairs)

    def _blocks(self) -> Iterator[Tensor]:
        with ExitStack() as stack:
            if self.file.suffix == ".safetensors":
                rows = stack.enter_context(safe_open(self.file, "pt")).get_slice(self.name)
            else:
                rows = _pickled(self.file)[self.name]
            for first in range(0, self.shape[0], _BLOCK_ROWS):
                yield rows[first : first + _BLOCK_ROWS]


def stored_tensors(folder: Path, key: str) -> dict[str, StoredTensor]:
    """Name -> tensor of every weight file in ``folder``.

    Raises:
        ValueError: No weights, a missing shard, a file that is not whole, or a dtype of quantised weights; names
            ``key``.
    """
    try:
        tensors = {}
        for file in weight_files(folder):
            for tensor in _contents(file):
                tensors[tensor.name] = tensor
        return tensors
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download {folder.name} again, whole.") from error
    except _UnknownDtype as error:
        raise ValueError(f"{key}: {error}, as quantised models do; give the unquantised checkpoint.") from error


class _UnknownDtype(Exception):
    """Says what is stored in it."""


def _contents(file: Path) -> list[StoredTensor]:
    if file.suffix != ".safetensors":
        return [StoredTensor(file, name, tuple(t.shape), t.dtype) for name, t in _pickled(file).items()]
    tensors = []
    for name, entry in safetensors_header(file)[0].items():
        if name != "__metadata__":
            if entry["dtype"] not in _DTYPES:
                raise _UnknownDtype(f"{file} holds {name} as {entry['dtype']}")
            tensors.append(StoredTensor(file, name, tuple(entry["shape"]), _DTYPES[entry["dtype"]]))
    return tensors


def _pickled(file: Path) -> dict[str, Tensor]:
    stat = file.stat()
    return _unpickled(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _unpickled(file: Path, _size: int, _mtime_ns: int) -> dict[str, Tensor]:
    try:
        try:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # saved before PyTorch 1.6: cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever a broken file leads to
        raise ValueError(f"{file} cannot be read ({one_line(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} holds something else than named tensors")
    return tensors


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The checkpoint's ``config.json``.

    Raises:
        ValueError: It is missing or broken, or describes a quantised model; names ``key``.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{key}: the folder {folder} holds no {CONFIG_FILE}; give the folder of a transformers model."
        )
    try:
        values = read_json(folder / CONFIG_FILE)
    except ValueError as error:
        raise ValueError(f"{key}: {error}. Copy or download it again, whole.") from error
    if not isinstance(values.get("model_type"), str) or not values["model_type"]:
        raise ValueError(
            f"{key}: {folder / CONFIG_FILE} has no model_type, so it does not say what the model is; give the folder "
            "of a transformers model with its own config.json."
        )
    quantised_by = _quantisation(folder, values)
    if quantised_by:
        raise ValueError(
            f"{key}: {folder} is quantised ({quantised_by}), and weights are copied as they are; give the unquantised "
            "checkpoint. Training can quantise the built model (quantization_bit)."
        )
    return values


def _quantisation(folder: Path, config: dict[str, Any]) -> str | None:
    """Where a checkpoint says that it is quantised, and how; None if it does not."""
    for part in (config, config.get("vision_config")):
        quantised = part.get("quantization_config") if isinstance(part, dict) else None
        if quantised:
            method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
            return f"quantization_config in {CONFIG_FILE}, method {method}"
    return next((name for name in _QUANTISED_FILES if (folder / name).is_file()), None)


def open_config(folder: Path, key: str) -> Any:
    """The configuration as transformers understands it.

    Raises:
        ValueError: transformers refuses it; names ``key``.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # each configuration class has its own checks and errors
        raise ValueError(
            f"{key}: {folder / CONFIG_FILE} is no valid configuration ({one_line(error)}). Correct it, or copy or "
            "download it again, whole."
        ) from error


def one_line(error: Exception) -> str:
    """An error of another library in one line of at most 300 characters, with its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


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
        read_config(Path(snapshot_download(repo, allow_patterns=_TEXT_FILES)), key)  # before the weights are fetched
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
