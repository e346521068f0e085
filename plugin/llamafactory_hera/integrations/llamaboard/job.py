"""A scoring job of the web UI: commands that run one after another in processes of their own."""

import atexit
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# tqdm's line, as the scoring pass and the teacher write it.
_BAR = re.compile(r"HeRA \| (?P<phase>[^:\r\n]+):\s*\d+%\|.*\| (?P<done>\d+)/(?P<total>\d+) \[")
_ANY_BAR = re.compile(r"\d+%\|")
_TAIL = 1 << 16  # bytes
_GRACE = 5.0  # seconds


@dataclass(frozen=True)
class Progress:
    """How far the current phase is."""

    phase: str
    done: int
    total: int


@dataclass
class Job:
    """Runs ``llamafactory-hera`` commands in order, until one fails.

    Attributes:
        kind: What the job is for.
        commands: Arguments of each command.
        folder: The run's output folder.
        log: The file that takes everything that they print.
        lang: Language of the page that started it.
        code: Exit status of the last command; None while one runs.
        aborted: A user stopped it.
    """

    kind: str
    commands: Sequence[Sequence[str]]
    folder: Path
    log: Path
    lang: str
    code: int | None = None
    aborted: bool = False
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def running(self) -> bool:
        """Whether a command runs or is about to."""
        return self.code is None

    def start(self) -> None:
        """Starts the first command.

        Raises:
            OSError: The log cannot be written.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        atexit.register(self.abort)
        threading.Thread(target=self._run, daemon=True).start()

    def abort(self) -> None:
        """Ends the command and all processes under it; a second call does nothing."""
        with self._lock:
            if not self.running:
                return
            self.aborted = True
            process = self._process
        if process is not None:
            _end(process.pid)

    def progress(self) -> Progress | None:
        """The phase that was last reported."""
        bars = list(_BAR.finditer(self._text()))
        return Progress(bars[-1]["phase"], int(bars[-1]["done"]), int(bars[-1]["total"])) if bars else None

    def said(self, n_lines: int = 30) -> str:
        """The last lines of the log, progress bars left out."""
        lines = [line.rstrip() for line in self._text().splitlines()]
        return "\n".join([line for line in lines if line and not _ANY_BAR.search(line)][-n_lines:])

    def _text(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def _run(self) -> None:
        code = 1
        try:
            for command in self.commands:
                code = self._one(command)
                if code != 0:
                    break
        except Exception as error:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{type(error).__name__}: {error}\n")
        finally:
            self.code = code
            atexit.unregister(self.abort)

    def _one(self, command: Sequence[str]) -> int:
        environment = {**os.environ, "TQDM_MININTERVAL": "0.5", "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            with self._lock:
                if self.aborted:
                    return 1
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "llamafactory_hera.cli", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            return self._process.wait()


def _end(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        processes = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=_GRACE)
    for process in alive:
        _signal(process.kill)


def _signal(send: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        send()
