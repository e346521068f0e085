"""``llamafactory-hera doctor``: is everything in place for ``stage: hera``, and if not, what to do."""

import gc
import importlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import llamafactory_hera

from . import installed
from .registry import PATCHES, statuses

_TESTED_HOST = "0.9.5"
_PACKAGES = ("llamafactory", "torch", "torchvision", "torchaudio", "transformers", "peft", "accelerate", "deepspeed")
_PINNED = 'pip install "llamafactory-hera[pinned]"'


class _Finding(NamedTuple):
    """One line of the report; ``remedy`` is set when something is off."""

    name: str
    text: str
    remedy: str | None = None


def run_doctor() -> int:
    """Prints the report and returns the exit status: 0 when everything is in place, 1 otherwise."""
    gc.disable()  # imports leave no garbage, and looking for it takes a quarter of the time
    findings = [*_packages_found(), *_accelerator(), *_patches()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.remedy is None else 'OFF'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy is not None:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    off = sum(finding.remedy is not None for finding in findings)
    print("\nEverything is in place." if not off else f"\n{off} thing(s) are off; the remedies stand above.")
    return 1 if off else 0


def _packages_found() -> Iterator[_Finding]:
    yield _Finding("llamafactory-hera", f"{llamafactory_hera.__version__}, Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            text, remedy = version(name), None
        except PackageNotFoundError:
            yield _Finding(name, "not installed", None if name in ("torchaudio", "deepspeed") else _PINNED)
            continue
        if name == "llamafactory" and text != _TESTED_HOST:
            text += f" (tested: {_TESTED_HOST}; see the patches below)"
        if error := _import_error(name):
            reason = str(error).strip().splitlines() or [type(error).__name__]
            text += f", does not import: {reason[0]}"
            remedy = f"install versions that belong together, for instance {_PINNED}"
        yield _Finding(name, text, remedy)


def _import_error(module: str) -> Exception | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    return None


def _accelerator() -> Iterator[_Finding]:
    try:
        import torch
    except Exception:  # reported above
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield _Finding("accelerator", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    else:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        yield _Finding("accelerator", accelerator.type if accelerator else "none: CPU only (enough for the demo)")


def _patches() -> Iterator[_Finding]:
    if os.environ.get("HERA_DISABLE", "0") not in ("", "0"):
        yield _Finding("patches", "switched off by HERA_DISABLE", "unset HERA_DISABLE to train with stage: hera")
        return
    if not installed():
        yield _Finding(
            "patches",
            "not installed at interpreter start: no llamafactory_hera.pth in a site-packages folder of this Python",
            "reinstall with `pip install --force-reinstall --no-deps llamafactory-hera`, and run Python without -S",
        )
        return
    for target, name in PATCHES:
        if error := _import_error(target):
            yield _Finding(f"patch {name}", f"{target} does not import: {error}", f"repair the host: {_PINNED}")
    for name, what, misfit in statuses():
        text = f"does not fit: {misfit}." if misfit else "applied."
        remedy = f"install a tested host ({_TESTED_HOST}): {_PINNED}" if misfit else None
        yield _Finding(f"patch {name}", f"{text} {what}", remedy)
