"""Files that appear whole or not at all, however the process that writes them ends."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Folder beside a run's weights, in its output folder and in each checkpoint, that holds what belongs to HeRA.
RUN_FOLDER = "hera"


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; it takes its place at the end, or goes when writing fails.

    A file that was there keeps its mode, and a link to it leads to the new one.

    Yields:
        A hidden name in the same folder, of this process alone.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        if path.is_file():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text as UTF-8, folders included."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def read_json(path: str | os.PathLike) -> Any:
    """A JSON file's content.

    Raises:
        ValueError: The file cannot be read, or is not JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Writes JSON that people can read, folders included."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors of any device and layout.

    Raises:
        OSError: The file cannot be written. (safetensors reports a full disk as an error of its own.)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(held, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:
            raise OSError(str(error)) from error
