"""The files of a calibration: all of one run, or none."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..selection.run import check_writable
from .adapter import CONFIG_FILE, WEIGHTS_FILE

REPORT_FILE, PICTURE_FILE, PROFILE_FILE = "calibration.json", "calibration.png", "calibration_profile.safetensors"


def check_folder(folder: Path) -> None:
    """Makes the folder and checks, before anything is computed, that it can be written and holds nobody's adapter.

    Raises:
        ValueError: It cannot be written, or holds an adapter that no calibration wrote.
    """
    check_writable(folder)
    ours = any((folder / name).exists() for name in (REPORT_FILE, PROFILE_FILE))
    if (folder / CONFIG_FILE).exists() and not ours:
        raise ValueError(
            f"output_dir: {folder} holds an adapter that no calibration wrote, and it would be replaced; give another "
            "folder."
        )


def write_outputs(
    folder: Path, report: dict[str, Any], adapter: Callable[[Path], Any] | None, draw: Callable[[Path], None]
) -> None:
    """Writes adapter, picture and report, and takes away what an earlier calibration left.

    Everything is made in a folder of its own and renamed; the report comes last, so that a folder with a report is
    complete.

    Args:
        folder: Where the files go.
        report: Content of ``calibration.json``.
        adapter: Writes the adapter's files into a folder; None without an adapter.
        draw: Writes the picture.

    Raises:
        ValueError: The folder cannot be written.
    """
    work = folder / f".calibration.tmp{os.getpid()}"
    try:
        work.mkdir()
        if adapter is not None:
            adapter(work)
        draw(work / PICTURE_FILE)
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (work / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        for name in (REPORT_FILE, CONFIG_FILE, WEIGHTS_FILE):
            with suppress(FileNotFoundError):
                (folder / name).unlink()
        for name in (WEIGHTS_FILE, CONFIG_FILE, PICTURE_FILE, REPORT_FILE):
            if (work / name).exists():
                os.replace(work / name, folder / name)
    except OSError as error:
        raise ValueError(f"output_dir: {folder} cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
