"""A job of the web UI, in processes of its own: a selection of heads, a comparison with before, or a calibration."""

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from llamafactory.extras.constants import TRAINING_ARGS
from llamafactory.webui.common import _clean_cmd, abort_process

from llamafactory_hera.files import RUN_FOLDER, write_text
from llamafactory_hera.heads.targets import Targets, file_name
from llamafactory_hera.teachers.fill import PROGRESS

SELECT, COMPARE, CALIBRATE = "select", "compare", "calibrate"
#: The comparison's picture and pages, in the run's ``hera`` folder.
REPORT = "report"

#: What a selection must share with a later scoring for their scores to be comparable, beside data and teacher.
_SCORED_WITH = ("select_mode", "select_samples", "select_k", "select_seed", "select_dtype", "pooling", "similarity")

_ANY_BAR = re.compile(r"\d+%\|")
_TAIL = 1 << 16  # bytes


@dataclass
class Job:
    """Runs ``llamafactory-hera`` commands in order, until one fails."""

    kind: str  # SELECT, COMPARE or CALIBRATE
    commands: Sequence[Sequence[str]]
    folder: Path  # the run's
    lang: str  # of the page that started it
    code: int | None = None  # exit status of the last command; None while one runs
    aborted: bool = False
    _process: subprocess.Popen | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def log(self) -> Path:
        """The file that takes everything that the commands print."""
        return self.folder / RUN_FOLDER / f"{self.kind}.log"

    @property
    def progress_log(self) -> Path:
        """The file to which the commands append how far they are."""
        return self.log.with_suffix(".jsonl")

    @property
    def running(self) -> bool:
        """Whether a command runs or is about to."""
        return self.code is None

    def start(self) -> None:
        """Starts the first command; raises ``OSError`` where the log cannot be written."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self.progress_log.write_bytes(b"")
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
            abort_process(process.pid)

    def progress(self) -> tuple[str, int, int] | None:
        """The phase that was last reported, how much of it is done, and of how much."""
        *lines, _ = self.progress_log.read_text(encoding="utf-8").split("\n")  # the last one may be incomplete
        return tuple(json.loads(lines[-1])) if lines else None

    def output(self, n_lines: int = 30) -> str:
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
        environment = {
            **os.environ,
            "TQDM_MININTERVAL": "0.5",
            "PYTHONUNBUFFERED": "1",
            PROGRESS: str(self.progress_log),
        }
        try:
            for command in self.commands:
                line = [sys.executable, "-m", "llamafactory_hera.cli", *command]
                with self.log.open("ab") as log, self._lock:
                    if self.aborted:
                        break
                    self._process = subprocess.Popen(
                        line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
                    )
                if code := self._process.wait():
                    break
        except Exception as error:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{type(error).__name__}: {error}\n")
        finally:
            self.code = code
            atexit.unregister(self.abort)


def heads_file(folder: Path) -> Path:
    """Where a run's selection is written."""
    return folder / RUN_FOLDER / file_name("head")


def recipe_job(kind: str, args: dict[str, Any], lang: str) -> Job:
    """A selection or calibration with these arguments; writes its recipe, or raises ``OSError`` where it cannot."""
    folder = Path(args["output_dir"])
    recipe = folder / RUN_FOLDER / f"{kind}.yaml"
    write_text(recipe, yaml.safe_dump(_clean_cmd(args), sort_keys=False, allow_unicode=True))
    return Job(kind, [[kind, str(recipe)]], folder, lang)


def compare_job(folder: Path, lang: str) -> Job | None:
    """Scores the model that a run has saved, and compares it with the selection before; None without a finished run.

    Without scores of that selection, as for heads that were written by hand, the model before training is scored, too.
    """
    recipe = folder / TRAINING_ARGS
    trained = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    if not (recipe.is_file() and trained):
        return None
    before, after = heads_file(folder), folder / RUN_FOLDER / "scores.json"
    provenance = Targets.load(before).provenance if before.is_file() else {}
    commands = []
    settings: list[str] = []
    if provenance.get("scores"):
        facts = {f"hera_{name}": f"hera_{name}" for name in _SCORED_WITH}
        settings = [f"{key}={provenance[fact]}" for key, fact in facts.items() if fact in provenance]
    else:
        before = folder / RUN_FOLDER / "before.json"
        commands.append(["score", str(recipe), "--output", str(before)])
    commands.append(["score", str(folder), "--recipe", str(recipe), "--output", str(after), *settings])
    written = str(folder / RUN_FOLDER / REPORT)
    report = ["--names", "before", "after", "--output", written, "--html", f"{written}.html"]
    commands.append(["report", str(before), str(after), *report])
    return Job(COMPARE, commands, folder, lang)
