"""The objectives side by side in a small rendered world: do HeRA's findings show on a CPU, with whatever answer.

A whole study, from nothing or from where it was stopped, to its report; docs/study.md says what it is and found.
"""

import argparse
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.selection.scores import package_versions
from plan import plan
from pool import Pool, UnitFailed, locked, marks, terminated_like_interrupted
from report import write_report
from results import gather, is_finished
from settings import BASELINE, CONTROL, SIZES, STUDY, TUNING, Settings


def run_study(output: str | os.PathLike, size: str = "default", workers: int = 2) -> Path:
    """Runs what of a study is not done yet, and writes ``report.md``, ``report.json`` and the figures.

    Args:
        output: The study's folder.
        size: One of ``SIZES``.
        workers: Runs side by side; numbers do not depend on it, times do.

    Returns:
        The page.

    Raises:
        ValueError: The size is unknown, the folder holds a study of other settings or something else, a package is
            missing, the folder cannot be made, or a unit failed.
    """
    if size not in SIZES:
        raise ValueError(f"STUDY={size!r}: choose one of {', '.join(SIZES)}")
    if workers < 1:
        raise ValueError(f"workers={workers}: choose 1 or more")
    root, settings = Path(output).absolute(), SIZES[size]
    _require_packages()
    _claim(root, settings, output)
    with locked(root) as lock, terminated_like_interrupted():
        pool = Pool(root, workers, lock, lambda line: print(f"[hera study] {line}", flush=True))
        try:
            pool.run(plan(root, settings))
        except UnitFailed as error:
            if not _is_reportable(root, settings):
                raise
            page = write_study_report(root, settings, workers, size)
            raise UnitFailed(f"{error}\nThe report holds the runs that have finished: {page}") from error
        return write_study_report(root, settings, workers, size)


def _is_reportable(root: Path, settings: Settings) -> bool:
    return (root / TUNING).exists() and any(is_finished(root, BASELINE, seed) for seed in settings.seeds)


def write_study_report(root: Path, settings: Settings, workers: int, size: str) -> Path:
    """Writes the report of a study from its files."""
    finished = marks(root)
    report = {
        "settings": settings.to_dict(),
        "command": f"python recipes/study --size {size}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            "load": os.getloadavg()[2],
            "python": platform.python_version(),
            "workers": _all(finished, "workers", workers),
        },
        "versions": {
            name: ", ".join(_all([mark.get("versions", {}) for mark in finished], name, found))
            for name, found in package_versions().items()
        },
        "elapsed_s": _elapsed(finished),
        "teacher": read_json(root / CONTROL),
        "tuning": read_json(root / TUNING),
        "measured": gather(root, settings),
    }
    return write_report(root, report)


def _claim(root: Path, settings: Settings, output: str | os.PathLike) -> None:
    """Writes the settings into an empty folder; refuses one that belongs to something else."""
    file = root / STUDY
    if file.exists():
        found = read_json(file)["settings"]
        asked = settings.to_dict()
        if found != asked:
            other = sorted(key for key in asked.keys() | found.keys() if found.get(key) != asked.get(key))
            raise ValueError(
                f"output={str(output)!r} holds a study with other settings ({', '.join(other)}): choose another "
                "folder, or remove it yourself"
            )
    elif root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and holds no study: choose another folder")
    else:
        try:
            write_json(file, {"settings": settings.to_dict()})
        except OSError as error:
            raise ValueError(
                f"output={str(output)!r} cannot be made ({error.strerror}): choose another folder"
            ) from error


def _require_packages() -> None:
    missing = [name for name in ("jieba", "nltk", "rouge_chinese", "scipy") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} cannot be imported, and the host predicts with them: "
            "pip install 'llamafactory-hera[study]'"
        )


def _all(marks: list[dict[str, Any]], key: str, now: Any) -> list[Any]:
    """What the units were done with; what it is now where no unit says."""
    return sorted({mark[key] for mark in marks if key in mark}) or [now]


def _elapsed(marks: list[dict[str, Any]]) -> float:
    """Wall time that the units took, side by side counted once."""
    spans = sorted((mark["started"], mark["started"] + mark["wall_s"]) for mark in marks)
    total, reached = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return round(total, 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(arguments: list[str] | None = None) -> int:
    """The command.

    Returns:
        The exit status: 0, 2 for bad input or a failed run, 130 when it was stopped.
    """
    parser = argparse.ArgumentParser(
        prog="study", description="Compare the objectives in a small rendered world (CPU, about 80 minutes)."
    )
    parser.add_argument("--size", default="default", help="smoke, default or full (default: %(default)s)")
    parser.add_argument("--output", help="folder of the study (default: hera_study/SIZE)")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each (%(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        print(run_study(parsed.output or f"hera_study/{parsed.size}", parsed.size, parsed.workers))
    except ValueError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("study: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
