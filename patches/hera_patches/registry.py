"""Which host modules are changed, and what became of each change in this process.

A patch module has ``WHAT`` (one line) and two functions: ``check(module)`` returns None, or ``NOT_NEEDED``, or says
why the change does not fit this version of the host; ``apply(module)`` makes it.
"""

import inspect
import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

# What a training run needs.
_TRAINING = (
    ("llamafactory.hparams.finetuning_args", "finetuning_args"),
    ("llamafactory.train.sft.workflow", "sft_workflow"),
    ("llamafactory.train.callbacks", "log_callback"),
    ("llamafactory.data.template", "templates"),
)
# What the host's web UI needs; training goes on without it.
_WEB_UI = (
    ("llamafactory.extras.constants", "constants"),
    ("llamafactory.extras.ploting", "loss_plot"),
    ("llamafactory.webui.common", "saved_settings"),
    ("llamafactory.webui.locales", "locales"),
    ("llamafactory.webui.components.train", "train_tab"),
    ("llamafactory.webui.runner", "runner"),
    ("llamafactory.webui.engine", "engine"),
)

#: Host module -> patch module of this package. Names only: nothing is imported before the host is.
PATCHES: tuple[tuple[str, str], ...] = _TRAINING + _WEB_UI
HOST_MODULES = frozenset(target for target, _ in PATCHES)

#: What ``check`` returns where the host already does what the patch is for.
NOT_NEEDED = "not needed"


@dataclass(frozen=True)
class Status:
    """What became of one patch: ``applied``, ``not needed`` or ``does not fit``, with the reason."""

    name: str
    target: str
    what: str
    state: str
    reason: str = ""


_statuses: dict[str, Status] = {}


def differs(owner: Any, **functions: list[str]) -> str | None:
    """Says which function of a host's module or class is missing or takes other parameters than listed, or None."""
    of = f"{owner.__name__}." if isinstance(owner, type) else ""
    for name, expected in functions.items():
        if not hasattr(owner, name):
            return f"no function {of}{name}"
        parameters = list(inspect.signature(getattr(owner, name)).parameters)
        if parameters != expected:
            return f"{of}{name} takes {parameters}"
    return None


def apply_to(module: ModuleType) -> None:
    """Applies the patch of a freshly executed host module; one that does not fit warns and leaves it alone."""
    name = next(name for target, name in PATCHES if target == module.__name__)
    patch = import_module(f"{__package__}.{name}")
    try:
        reason = patch.check(module)
        if reason is None:
            patch.apply(module)
    except Exception as error:  # a broken patch must not take the host down
        reason = f"{type(error).__name__}: {error}"
    if reason in (None, NOT_NEEDED):
        _statuses[name] = Status(name, module.__name__, patch.WHAT, reason or "applied")
        return
    _statuses[name] = Status(name, module.__name__, patch.WHAT, "does not fit", reason)
    lost = "`stage: hera`" if (module.__name__, name) in _TRAINING else "HeRA in the web UI"
    print(
        f"llamafactory-hera: the patch {name!r} does not fit this LLaMA-Factory ({reason}); {lost} may be "
        "unavailable. Run `llamafactory-hera doctor`.",
        file=sys.stderr,
    )


def statuses() -> list[Status]:
    """The state of every patch whose target was imported in this process."""
    return [_statuses[name] for _, name in PATCHES if name in _statuses]


def require() -> None:
    """Checks that every patch that a training run needs and that was tried fits.

    Raises:
        RuntimeError: One does not fit this version of the host.
    """
    misfits = [
        f"{status.name} ({status.reason})"
        for status in statuses()
        if status.state == "does not fit" and (status.target, status.name) in _TRAINING
    ]
    if misfits:
        raise RuntimeError(
            f"stage: hera cannot run on this LLaMA-Factory: {'; '.join(misfits)}. Install a tested version "
            '(`pip install "llamafactory-hera[pinned]"`), or see `llamafactory-hera doctor`.'
        )
