"""The files of a calibration: all of one run, or none."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..selection.run import check_writable
from .adapter import CONFIG_FILE, WEIGHTS_FILE

REPORT_FILE, PICTURE_FILE, PROFILE_FILE = "calibration.json", "calibration.png", "calibration_profile.safetensors"


_DIGEST = "adapter_sha256"


def check_folder(folder: Path) -> None:
    """Makes the folder and checks, before anything is computed, that it can be written and holds nobody's adapter.

    Raises:
        ValueError: It cannot be written, or holds an adapter that no calibration wrote, or that was changed since.
    """
    check_writable(folder)
    if any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)) and not _is_ours(folder):
        raise ValueError(
            f"output_dir: {folder} holds an adapter that no calibration wrote, or that was trained since, and it "
            "would be replaced; give another folder, or move the adapter away."
        )


def _is_ours(folder: Path) -> bool:
    """Whether the adapter in a folder is the one that its report tells of."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        return report[_DIGEST] == _digest(folder / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_outputs(
    folder: Path, report: dict[str, Any], adapter: Callable[[Path], Any] | None, draw: Callable[[Path], None]
) -> None:
    """Writes adapter, picture and report, and takes away what an earlier calibration left.

    Everything is made in a folder of its own and renamed; the report comes last, so that a folder with a report is
    complete.

    Args:
        folder: Where the files go.
        report: Content of ``calibration.json``; the digest of the adapter's weights is added to it.
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
        report[_DIGEST] = _digest(work / WEIGHTS_FILE) if adapter is not None else None
        draw(work / PICTURE_FILE)
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (work / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        for name in (REPORT_FILE, CONFIG_FILE, WEIGHTS_FILE):
            with suppress(FileNotFoundError):
                (folder / name).unlink()
        for name in (WEIGHTS_FILE, CONFIG_FILE, PICTURE_FILE, REPORT_FILE):
            if (work / name).exists():
                os.replace(work / name, folder / name)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise cannot_be_written(folder, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def cannot_be_written(folder: Path, error: Exception) -> ValueError:
    """What to raise when a file of the output folder cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return ValueError(
        f"output_dir: {folder} cannot be written ({reason}); make room there, or give another folder, and run the "
        "same command again."
    )
