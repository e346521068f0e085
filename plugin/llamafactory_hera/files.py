"""Files that appear whole or not at all, however the process that writes them ends, and the lock of a run's folder."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor

#: Folder beside a run's weights, in its output folder and in each checkpoint, that holds HeRA's own files.
RUN_FOLDER = "hera"
#: The summary of a finished run, in that folder.
CARD = "card.json"


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from writing into the ``hera`` folder of a run; ``ValueError`` if another one does."""
    path = Path(output_dir).expanduser() / RUN_FOLDER / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, blocking=False, is_singleton=True):  # a process may enter it again
            yield
    except Timeout as error:
        raise ValueError(
            f"output_dir: {output_dir} is in use by another process; wait for it, or give another folder."
        ) from error


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which replaces it at the end, or is removed if writing fails.

    A replaced file keeps its mode, and links to it stay valid.
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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8 and makes the folder."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file; ``ValueError`` names a file that cannot be read, or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Writes readable JSON and makes the folder."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors of any device and layout."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # reported for a full disk, too
            raise OSError(f"{path} cannot be written ({error})") from error
