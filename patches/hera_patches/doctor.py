"""The checks of ``llamafactory-hera doctor``, which find problems with ``stage: hera`` and print remedies."""

import importlib
import logging
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import llamafactory_hera

from . import disabled, installed, patches
from .registry import MISFITS, PINNED_INSTALL, TESTED_HOST

_OPTIONAL = ("torchaudio", "deepspeed")
_PACKAGES = ("llamafactory", "torch", "torchvision", "transformers", "peft", "accelerate", *_OPTIONAL)
_VERSION_ONLY = ("trl", "axolotl", "lmms-eval", "bitsandbytes")  # listed if installed; importing them takes long


class _Finding(NamedTuple):
    """A line of the report; a ``remedy`` marks a problem."""

    name: str
    text: str
    remedy: str | None = None


def run_doctor() -> int:
    """Prints the report and returns the exit status: 0 if it lists no problem, 1 otherwise."""
    logging.disable(logging.WARNING)  # DeepSpeed warns about a machine without a GPU when it is imported
    findings = [*_packages(), *_accelerator(), *_patches()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.remedy is None else 'OFF'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy is not None:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.remedy is not None for finding in findings)
    print(f"\n{problems} problem(s) found; a remedy follows each." if problems else "\nNo problem found.")
    return 1 if problems else 0


def _packages() -> Iterator[_Finding]:
    yield _Finding("llamafactory-hera", f"{llamafactory_hera.__version__}, Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            text, remedy = version(name), None
        except PackageNotFoundError:
            yield _Finding(name, "not installed", None if name in _OPTIONAL else PINNED_INSTALL)
            continue
        if name == "llamafactory" and text != TESTED_HOST:
            text += f" (tested: {TESTED_HOST}; see the patches below)"
        if error := _import_error(name):
            text, remedy = f"{text}, {error}", f"install versions that work together: {PINNED_INSTALL}"
        yield _Finding(name, text, remedy)
    for name in _VERSION_ONLY:
        with suppress(PackageNotFoundError):
            yield _Finding(name, version(name))


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"import fails: {lines[0]}"
    return None


def _accelerator() -> Iterator[_Finding]:
    try:
        import torch
    except Exception:  # already in the report
        return
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        yield _Finding("accelerator", "none, CPU only (enough for the demo)")
    else:
        name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        yield _Finding("accelerator", f"{torch.accelerator.device_count()} x {name}")


def _patches() -> Iterator[_Finding]:
    if disabled():
        yield _Finding("patches", "disabled by HERA_DISABLE", "unset HERA_DISABLE to train with stage: hera")
        return
    if not installed():
        text = "not active: this Python has no llamafactory_hera.pth in a site-packages folder, or ignores it"
        yield _Finding("patches", text, "install the plugin again, and run Python without -S")
        return
    for host, patch in patches().items():
        name = f"patch {patch.name}"
        if error := _import_error(host):
            yield _Finding(name, f"{host}: {error}", f"repair it: {PINNED_INSTALL}")
        elif misfit := MISFITS[patch.name]:
            remedy = f"install LLaMA-Factory {TESTED_HOST}: {PINNED_INSTALL}"
            yield _Finding(name, f"does not fit: {misfit}. {patch.summary}", remedy)
        else:
            yield _Finding(name, f"applied. {patch.summary}")
