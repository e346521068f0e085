"""The checks of ``llamafactory-hera doctor``, which find problems with an installation and print remedies."""

import importlib
import logging
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

from . import __version__
from .integrations.llamafactory import PATCHES, PATCHES_INSTALL, PINNED_INSTALL, TESTED_HOST

_NEEDED, _OPTIONAL = ("torch", "torchvision", "transformers", "peft", "accelerate"), ("torchaudio", "deepspeed")


class _Finding(NamedTuple):
    """A line of the report; a ``remedy`` marks a problem."""

    name: str
    text: str
    remedy: str | None = None


def run_doctor() -> int:
    """Prints the report and returns the exit status: 0 if it lists no problem, 1 otherwise."""
    logging.disable(logging.WARNING)  # DeepSpeed warns on import if the machine has no GPU
    findings = [*_packages(), *_patches()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.remedy is None else 'OFF'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy is not None:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    problems = sum(finding.remedy is not None for finding in findings)
    print(f"\n{problems} problem(s) found; remedies are above." if problems else "\nNo problem found.")
    return 1 if problems else 0


def _packages() -> Iterator[_Finding]:
    yield _Finding("llamafactory-hera", f"{__version__}, Python {platform.python_version()}")
    yield from _host()
    for name in (*_NEEDED, *_OPTIONAL):
        if found := _version(name):
            yield _imported(name, found)
        else:
            yield _Finding(name, "not installed", _remedy(name) if name in _NEEDED else None)


def _host() -> Iterator[_Finding]:
    """Reports LLaMA-Factory and its patches, which need each other; other hosts need neither."""
    patches = _version(PATCHES) if find_spec("hera_patches") else None
    host = _version("llamafactory")
    if patches is None:
        yield _Finding(PATCHES, "not installed; stage: hera needs it", PATCHES_INSTALL if host else None)
    else:
        yield _Finding(PATCHES, patches, None if patches == __version__ else PATCHES_INSTALL)
    if host is None:
        yield _Finding("llamafactory", "not installed", PINNED_INSTALL if patches else None)
    else:
        yield _imported("llamafactory", host, "" if host == TESTED_HOST else f" (tested: {TESTED_HOST})")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _imported(name: str, found: str, note: str = "") -> _Finding:
    error = _import_error(name)
    return _Finding(name, f"{found}{note}{f', {error}' if error else ''}", _remedy(name) if error else None)


def _remedy(name: str) -> str:
    """Returns the remedy for a package that is missing or broken; only LLaMA-Factory has a tested set of versions."""
    pinned = f"install versions that work together: {PINNED_INSTALL}"
    return pinned if _version("llamafactory") else f"install a {name} that fits the versions of your other packages"


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"import fails: {lines[0]}"
    return None


def _patches() -> Iterator[_Finding]:
    if not all(map(find_spec, ("llamafactory", "hera_patches"))):
        return  # _host() has reported the missing package
    from hera_patches import disabled, installed, patches
    from hera_patches.registry import MISFITS

    if disabled():
        yield _Finding("patches", "disabled by HERA_DISABLE", "unset HERA_DISABLE to train with stage: hera")
        return
    if not installed():
        text = "not active: llamafactory_hera_patches.pth is missing from site-packages, or this Python ignores it"
        yield _Finding("patches", text, f"run Python without -S, or install {PATCHES} again: {PATCHES_INSTALL}")
        return
    for host, patch in patches().items():
        name = f"patch {patch.name}"
        if error := _import_error(host):
            yield _Finding(name, f"{host}: {error}", f"reinstall: {PINNED_INSTALL}")
        elif misfit := MISFITS[patch.name]:
            remedy = f"install LLaMA-Factory {TESTED_HOST}: {PINNED_INSTALL}"
            yield _Finding(name, f"does not fit: {misfit}. {patch.summary}", remedy)
        else:
            yield _Finding(name, f"applied. {patch.summary}")
