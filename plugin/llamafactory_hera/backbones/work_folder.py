"""Where a build works: a folder beside its output, which becomes the output when the model is complete."""

import os
import shutil
from pathlib import Path

from ..teachers.files import read_json
from .plan import PlannedTensor
from .writer import bytes_to_write, write_json

#: Of an unfinished build: which request it belongs to.
REQUEST = "build.json"


class WorkFolder:
    """``OUTPUT.partial``, and the way from there to ``OUTPUT``.

    The request stays in the folder until it has its final name, so that a build that was killed at any point is
    continued, and a folder under the final name is always whole.

    Args:
        output: Folder to make; a link is followed, so that it points to the model afterwards.

    Raises:
        ValueError: It holds something else, or cannot be made there.
    """

    def __init__(self, output: str | Path) -> None:
        try:
            self.output = Path(output).absolute().resolve()
            self._check()
        except (OSError, RuntimeError) as error:  # a link that leads to itself is a RuntimeError before Python 3.13
            raise ValueError(f"--output: {output} cannot be used ({error}); give another folder.") from error
        self.partial = self.output.with_name(f"{self.output.name}.partial")
        self._started = False

    def _check(self) -> None:
        empty = self.output.is_dir() and not any(self.output.iterdir())
        if self.output.exists() and not empty and not (self.output / REQUEST).is_file():
            what = "not empty" if self.output.is_dir() else "a file"
            raise ValueError(f"--output: {self.output} is {what}; give another folder, or remove it yourself.")
        parent = _nearest(self.output.parent)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            why = "cannot be written" if parent.is_dir() else "is a file"
            raise ValueError(f"--output: {self.output} cannot be made, {parent} {why}; give another folder.")

    def is_finished(self, request: str) -> bool:
        """Whether the output is this request's model, renamed by a build that was killed right after."""
        if not (self.output / REQUEST).is_file():
            return False
        if _request_in(self.output) != request:
            raise ValueError(f"--output: {self.output} is not empty; give another folder, or remove it yourself.")
        return True

    def start(self, planned: list[PlannedTensor], request: str) -> None:
        """Makes the folder, or checks that the one that is there belongs to the same request.

        Raises:
            ValueError: It belongs to another one, or there is too little room.
            OSError: It cannot be made.
        """
        left = {file.name for file in self.partial.iterdir()} if self.partial.is_dir() else set()
        found = _request_in(self.partial)
        if found != request and left - {REQUEST, f"{REQUEST}.tmp"}:
            whose = (
                "an unfinished build of other models or with other options"
                if found
                else f"files, and no {REQUEST} that says of which build they are"
            )
            raise ValueError(f"--output: {self.partial} holds {whose}; remove it, or give another --output.")
        needed = bytes_to_write(planned, self.partial)
        free = shutil.disk_usage(_nearest(self.partial)).free
        if free < needed:
            raise ValueError(
                f"--output: {size_text(needed)} are needed for {self.output}, {size_text(free)} are free; make room "
                "and run the same command again, or give a folder on another disk."
            )
        if found != request:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._started = True
            write_json(self.partial / REQUEST, {"request": request})
        self._started = True

    def finish(self) -> None:
        """Gives the folder its final name.

        Raises:
            OSError: Something else has that name by now.
        """
        if not (self.output / REQUEST).is_file():
            if self.output.exists():
                self.output.rmdir()
            os.replace(self.partial, self.output)
        (self.output / REQUEST).unlink()

    def failure(self, error: OSError) -> ValueError:
        """What to tell the user when writing failed; a folder without a finished shard is removed."""
        kept = ""
        if any(self.partial.glob("*.safetensors")):
            kept = (
                f" What is finished is kept in {self.partial}: run the same command again when the cause is mended, "
                "or remove it."
            )
        elif self._started:
            shutil.rmtree(self.partial, ignore_errors=True)
        return ValueError(
            f"--output: {self.output} cannot be written ({error}). Make room, or give another folder.{kept}"
        )


def _request_in(folder: Path) -> str | None:
    try:
        return read_json(folder / REQUEST).get("request")
    except ValueError:
        return None


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def size_text(n_bytes: int) -> str:
    """A number of bytes with three digits, in the unit that fits: ``1.50 GiB``."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n_bytes >= 1024**power:
            return f"{n_bytes / 1024**power:.{2 if n_bytes < 10 * 1024**power else 1}f} {unit}"
    return f"{n_bytes} bytes"
