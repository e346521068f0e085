"""Runs a study's units of work, some side by side, and remembers which are done."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.selection.scores import package_versions

# One thread each: as many runs as cores side by side is the fastest way, and a run's numbers do not depend on cores.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}


class UnitFailed(ValueError):
    """Processes of a unit, or several units, ended with an error."""


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done as a whole or done again.

    Attributes:
        name: Names its log and its mark, for instance ``runs/sft-s0/stage1``.
        kind: Units of one kind take about as long; the time left is estimated by it.
        commands: Processes, one after another, started in the study's folder.
        outputs: What it makes; removed before it is tried again.
        after: Names of units that must be done before.
        prepare: Called in this process before the commands.
    """

    name: str
    kind: str
    commands: tuple[tuple[str, ...], ...] = ()
    outputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None


def mark_of(root: Path, name: str) -> Path:
    """The file that says that a unit is done, and what it took."""
    return root / "done" / f"{name}.json"


def marks(root: Path) -> list[dict[str, Any]]:
    """What finished units took; a damaged mark counts as none."""
    found = map(_read_mark, (root / "done").rglob("*.json"))
    return [mark for mark in found if mark is not None]


def _read_mark(path: Path) -> dict[str, Any] | None:
    try:
        mark = read_json(path)
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and "kind" in mark else None


@contextmanager
def locked(root: Path) -> Iterator[int]:
    """Holds the study's folder; its processes inherit the lock, so it outlives a killed command until they end.

    Raises:
        ValueError: Another process holds it.
    """
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"output={str(root)!r}: a study runs in it already, or a process of a killed one has not ended yet; "
                "wait for it, or choose another folder"
            ) from error
        yield file.fileno()


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Lets SIGTERM stop the processes as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Pool:
    """Works through units.

    Args:
        root: The study's folder.
        workers: Units side by side.
        lock: File descriptor that the processes inherit.
        show: Takes a line about progress.
    """

    def __init__(self, root: Path, workers: int, lock: int, show: Callable[[str], None] = print) -> None:
        self._root, self._workers, self._lock, self._show = root, workers, lock, show
        self._versions = package_versions()
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, units: Sequence[Unit]) -> None:
        """Runs every unit that is not done, in order of the list as far as ``after`` allows.

        What does not need a unit that failed is done all the same: one run out of many that cannot be trained must
        not keep the others from being reported.

        Raises:
            UnitFailed: At the end, if a unit failed; names its log.
        """
        done = {unit.name for unit in units if self._is_done(unit)}
        waiting = [unit for unit in units if unit.name not in done]
        if done:
            self._show(f"{len(done)} of {len(units)} are done already")
        running: dict[Future[float], Unit] = {}
        failed: dict[str, UnitFailed | None] = {}  # None for a unit that needs one that failed
        with ThreadPoolExecutor(self._workers) as executor:
            try:
                while waiting or running:
                    for unit in [unit for unit in waiting if done.issuperset(unit.after)]:
                        if len(running) < self._workers:
                            waiting.remove(unit)
                            running[executor.submit(self._run_unit, unit)] = unit
                    if not running:
                        missing = {name for unit in waiting for name in unit.after} - {unit.name for unit in units}
                        raise RuntimeError(f"units wait for {sorted(missing)}, which is not planned")
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        unit = running.pop(future)
                        try:
                            wall = future.result()
                        except UnitFailed as error:
                            self._show(f"{unit.name} failed, going on with what does not need it")
                            failed[unit.name] = error
                            while lost := [unit for unit in waiting if failed.keys() & set(unit.after)]:
                                failed |= dict.fromkeys(unit.name for unit in lost)
                                waiting = [unit for unit in waiting if unit not in lost]
                            continue
                        done.add(unit.name)
                        left = self._left([*waiting, *running.values()])
                        self._show(f"{len(done)}/{len(units)} {unit.name} {wall:.0f} s{left}")
            except BaseException:
                self._stop()
                raise
        if failed:
            left_out = sum(error is None for error in failed.values())
            message = "\n".join(str(error) for error in failed.values() if error is not None)
            raise UnitFailed(f"{message}\n{left_out} units that need this were left out." if left_out else message)

    def _is_done(self, unit: Unit) -> bool:
        made = all((self._root / output).exists() for output in unit.outputs)
        return made and _read_mark(mark_of(self._root, unit.name)) is not None

    def _run_unit(self, unit: Unit) -> float:
        for output in unit.outputs:
            path = self._root / output
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        started = time.time()
        if unit.prepare is not None:
            unit.prepare()
        log = self._root / "logs" / f"{unit.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        used = [self._run_command(unit, command, log) for command in unit.commands]
        wall = time.time() - started
        mark = {"kind": unit.kind, "started": round(started), "wall_s": round(wall, 2), "processes": used}
        mark |= {"workers": self._workers, "versions": self._versions}
        write_json(mark_of(self._root, unit.name), mark)
        return wall

    def _run_command(self, unit: Unit, command: tuple[str, ...], log: Path) -> dict[str, Any]:
        started = time.time()
        with open(log, "ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=self._root,
                env={**os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock,),
            )
            self._running.add(process)
            if self._stopped:
                self._stop()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._running.discard(process)
        if process.returncode:
            tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise UnitFailed(
                f"{unit.name} failed with status {process.returncode}; see {log}. The same command goes on from "
                f"there. It ended with:\n" + "\n".join(tail)
            )
        return {
            "command": " ".join(command),
            "wall_s": round(time.time() - started, 2),
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_mib": round(usage.ru_maxrss / 1024, 1),
        }

    def _stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            if process.returncode is None:
                try:
                    os.killpg(process.pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue

    def _left(self, units: list[Unit]) -> str:
        walls: dict[str, list[float]] = {}
        for mark in marks(self._root):
            walls.setdefault(mark["kind"], []).append(mark["wall_s"])
        if not units:
            return ""
        seconds = [sum(walls[unit.kind]) / len(walls[unit.kind]) for unit in units if unit.kind in walls]
        unknown = {unit.kind for unit in units} - walls.keys()
        minutes = f"{sum(seconds) / self._workers / 60:.0f} min left"
        return f"; {minutes} beside {len(unknown)} kinds of work not timed yet" if unknown else f"; {minutes}"
