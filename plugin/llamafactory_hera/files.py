"""Files that appear whole or not at all, however the process that writes them ends."""

import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Folder beside a run's weights, in its output folder and in each checkpoint, that holds what belongs to HeRA.
RUN_FOLDER = "hera"
#: What a finished run says of itself, in that folder.
CARD = "card.json"
LOCK = f"{RUN_FOLDER}/.lock"  #: In an output folder while a run writes there.
_ABANDONED_AFTER_SECONDS = 3600
_HELD: set[str] = set()


@contextmanager
def writing(key: str, path: str | os.PathLike, remedy: str = "give another folder") -> Iterator[None]:
    """Makes an ``OSError`` a ``ValueError`` with the key, the path that is written to, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{key}: {path} cannot be written ({error.strerror or error}); {remedy}.") from error


@contextmanager
def held(lock: str | os.PathLike, key: str) -> Iterator[None]:
    """Keeps other processes from what ``FOLDER/.lock`` or ``FOLDER.lock`` stands for; a process may enter it again.

    The file names host and process. The kernel says whether a process of this host still lives; of other hosts, whose
    locks a shared file system may not show, a file that is there counts.

    Raises:
        ValueError: Another process holds it, or it cannot be written; names ``key``, and the process.
    """
    path = os.path.realpath(lock)
    if path in _HELD:
        yield
        return
    with writing(key, path.removesuffix(".lock").rstrip("/")):
        descriptor = _taken(path, key)
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.discard(path)
        Path(path).unlink(missing_ok=True)
        os.close(descriptor)


def _taken(path: str, key: str) -> int:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    here, free = socket.gethostname(), True
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        content = os.pread(descriptor, 512, 0).decode(errors="replace")
        host, _, process = content.partition(" ")
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks lets the process table decide
            lives = process != "" and os.path.exists(f"/proc/{process}")
            free = error.errno not in (errno.EACCES, errno.EAGAIN) and not lives
        if not free or host not in ("", here):
            os.close(descriptor)
            gone = "" if host in ("", here) else f"; if that is gone, remove {path}"
            raise ValueError(
                f"{key}: process {process} on {host} writes there; wait for it, or give another folder{gone}."
            )
        with suppress(FileNotFoundError):  # its last holder has removed it since: take the new one
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{here} {os.getpid()}".encode(), 0)
                return descriptor
        os.close(descriptor)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; it takes its place at the end, or goes when writing fails.

    A file that was there keeps its mode, and a link to it leads to the new one.

    Yields:
        A hidden name in the same folder, of this process alone.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED_AFTER_SECONDS:  # by a process that was killed
                left.unlink()
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


def read_json_lines(path: str | os.PathLike) -> list[Any]:
    """The lines of a file that is appended to; one that a killed process left half is left out."""
    found = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


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
