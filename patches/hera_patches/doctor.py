"""``llamafactory-hera doctor``: is everything in place for ``stage: hera``, and if not, what to do."""

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import llamafactory_hera

from . import installed
from .registry import PATCHES, statuses

TESTED_HOSTS = ("0.9.5",)
_PACKAGES = ("llamafactory", "torch", "torchvision", "torchaudio", "transformers", "peft", "accelerate", "deepspeed")
_PINNED = 'pip install "llamafactory-hera[pinned]"'


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` is set when something is off."""

    name: str
    text: str
    remedy: str | None = None


def run_doctor() -> int:
    """Prints the report.

    Returns:
        The exit status: 0 when everything is in place, 1 otherwise.
    """
    findings = [finding for check in _CHECKS for finding in check()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{'ok ' if finding.remedy is None else 'OFF'} {finding.name:<{width}}  {finding.text}")
        if finding.remedy is not None:
            print(f"    {'':<{width}}  -> {finding.remedy}")
    off = sum(finding.remedy is not None for finding in findings)
    print("\nEverything is in place." if not off else f"\n{off} thing(s) are off; the remedies stand above.")
    return 1 if off else 0


def _versions() -> Iterator[Finding]:
    yield Finding("llamafactory-hera", f"{llamafactory_hera.__version__}, Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            text, remedy = version(name), None
        except PackageNotFoundError:
            text = "not installed"
            remedy = None if name in ("torchaudio", "deepspeed") else _PINNED
        if name == "llamafactory" and text not in (*TESTED_HOSTS, "not installed"):
            text += f" (tested: {', '.join(TESTED_HOSTS)}; see the patches below)"
        yield Finding(name, text, remedy)


def _torch_family() -> Iterator[Finding]:
    name = "torch family"
    for module in ("torch", "torchvision", "torchaudio"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                yield _broken_family(name, module, error)
                return
        except Exception as error:
            yield _broken_family(name, module, error)
            return
    yield Finding(name, "torch, torchvision and torchaudio import together")


def _broken_family(name: str, module: str, error: Exception) -> Finding:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return Finding(
        name,
        f"{module} does not import beside torch: {reason[0]}",
        f"install versions that belong together, for instance {_PINNED} (torch 2.11.0, torchvision 0.26.0, "
        "torchaudio 2.11.0)",
    )


def _accelerator() -> Iterator[Finding]:
    try:
        import torch
    except Exception:  # reported above
        return
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Finding("accelerator", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}")
    else:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        yield Finding("accelerator", accelerator.type if accelerator else "none: CPU only (enough for the demo)")


def _deepspeed() -> Iterator[Finding]:
    try:
        importlib.import_module("deepspeed")
    except ModuleNotFoundError:
        yield Finding("deepspeed import", "not installed: no ZeRO")
    except Exception as error:
        yield Finding("deepspeed import", f"fails: {error}", f"reinstall it: {_PINNED}")
    else:
        yield Finding("deepspeed import", "works")


def _patches() -> Iterator[Finding]:
    if os.environ.get("HERA_DISABLE", "0") not in ("", "0"):
        yield Finding("patches", "switched off by HERA_DISABLE", "unset HERA_DISABLE to train with stage: hera")
        return
    if not installed():
        yield Finding(
            "patches",
            "not installed at interpreter start: no llamafactory_hera.pth in a site-packages folder of this Python",
            "reinstall with `pip install --force-reinstall --no-deps llamafactory-hera`, and run Python without -S",
        )
        return
    for target, name in PATCHES:
        try:
            importlib.import_module(target)
        except Exception as error:
            yield Finding(f"patch {name}", f"{target} does not import: {error}", f"repair the host: {_PINNED}")
    for status in statuses():
        remedy = None
        if status.state == "does not fit":
            remedy = f"install a tested host ({', '.join(TESTED_HOSTS)}): {_PINNED}"
        text = f"{status.state}: {status.reason}" if status.reason else status.state
        yield Finding(f"patch {status.name}", f"{text} ({status.what})", remedy)


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _torch_family,
    _accelerator,
    _deepspeed,
    _patches,
)
