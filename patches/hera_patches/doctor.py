"""``llamafactory-hera doctor``: is everything in place for ``stage: hera``, and if not, what to do."""

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
    findings = [*_versions(), *_torch_family(), *_accelerator(), *_deepspeed(), *_patches()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.remedy is None else 'OFF'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy is not None:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    off = sum(finding.remedy is not None for finding in findings)
    print("\nEverything is in place." if not off else f"\n{off} thing(s) are off; the remedies stand above.")
    return 1 if off else 0


def _versions() -> Iterator[_Finding]:
    yield _Finding("llamafactory-hera", f"{llamafactory_hera.__version__}, Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            text, remedy = version(name), None
        except PackageNotFoundError:
            text = "not installed"
            remedy = None if name in ("torchaudio", "deepspeed") else _PINNED
        if name == "llamafactory" and text not in (_TESTED_HOST, "not installed"):
            text += f" (tested: {_TESTED_HOST}; see the patches below)"
        yield _Finding(name, text, remedy)


def _import_error(module: str) -> Exception | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return error
    return None


def _torch_family() -> Iterator[_Finding]:
    for module in ("torch", "torchvision", "torchaudio"):
        error = _import_error(module)
        if error is not None and not (isinstance(error, ModuleNotFoundError) and error.name == module):
            reason = str(error).strip().splitlines() or [type(error).__name__]
            yield _Finding(
                "torch family",
                f"{module} does not import beside torch: {reason[0]}",
                f"install versions that belong together, for instance {_PINNED} (torch 2.11.0, torchvision 0.26.0, "
                "torchaudio 2.11.0)",
            )
            return
    yield _Finding("torch family", "torch, torchvision and torchaudio import together")


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


def _deepspeed() -> Iterator[_Finding]:
    error = _import_error("deepspeed")
    if isinstance(error, ModuleNotFoundError):
        yield _Finding("deepspeed import", "not installed: no ZeRO")
    elif error is not None:
        yield _Finding("deepspeed import", f"fails: {error}", f"reinstall it: {_PINNED}")
    else:
        yield _Finding("deepspeed import", "works")


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
    for status in statuses():
        remedy = f"install a tested host ({_TESTED_HOST}): {_PINNED}"
        text = f"{status.state}: {status.reason}" if status.reason else status.state
        yield _Finding(
            f"patch {status.name}", f"{text} ({status.what})", remedy if status.state == "does not fit" else None
        )
