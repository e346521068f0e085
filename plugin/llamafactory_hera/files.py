"""Atomic file writes, which never leave a partial file behind, and the lock of a run's folder."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor

#: The folder of HeRA's files, inside a run's output folder and inside each checkpoint.
RUN_FOLDER = "hera"
#: The file in that folder that summarizes a finished run.
CARD = "card.json"
#: The entry of ``config.json`` that marks a model made by ``llamafactory-hera build``, even after training: its LLM.
BUILT = "hera_built"
#: The mark by which ``check_replaceable`` recognizes this package's pictures.
PICTURE = "llamafactory-hera"


def create_folder(path: Path, key: str) -> Path:
    """Creates a folder if it does not exist, and returns it; raises ``ValueError`` with the key if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{key}: {path} cannot be created ({error.strerror}); give another folder.") from error
    return path


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """Locks the ``hera`` folder of a run; raises ``ValueError`` if another process holds the lock."""
    path = create_folder(Path(output_dir).expanduser() / RUN_FOLDER, "output_dir") / ".lock"
    try:
        with FileLock(path, blocking=False, is_singleton=True):  # reentrant within a process
            yield
    except Timeout as error:
        raise ValueError(
            f"output_dir: {output_dir} is in use by another process; wait until it ends, or give another folder."
        ) from error


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path; the file written there then replaces ``path``, or is removed if writing failed.

    A replaced file keeps its mode, and symbolic links to the file stay valid.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(marks: Mapping[str | os.PathLike, str]) -> None:
    """Checks that each output path (a key of ``marks``) is writable, and that an existing file contains its mark."""
    for path, mark in marks.items():
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=Path(path).parent).close()
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror}); give another path.") from error
        if os.path.isdir(path) or (os.path.isfile(path) and mark.encode() not in Path(path).read_bytes()[:4096]):
            raise ValueError(f"{path} exists and is not a file that this command writes; give another path.")


@contextmanager
def reading(path: str | os.PathLike, description: str) -> Iterator[None]:
    """Turns any error from reading a file, which may come from elsewhere, into a ``ValueError`` with the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise ValueError(f"{path} is not {description} ({type(error).__name__}: {error})") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8 and creates the folder if needed."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; raises ``ValueError`` if the file cannot be read or is not JSON."""
    with reading(path, "JSON"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Writes indented JSON and creates the folder if needed."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, which may be on any device and need not be contiguous."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # a full disk raises this error, for instance
            raise OSError(f"{path} cannot be written ({error})") from error
