"""Which host modules are changed, and what became of each change in this process.

The first line of a patch module's docstring says what it does; its ``apply(module)`` makes the change, or raises where
it does not fit. What it needs of the host: ``FUNCTIONS`` (dotted name -> parameters), ``USED`` (dotted name of a
function -> names that it uses). All are tested with 0.9.5.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

# What a training run needs.
_TRAINING = (
    ("llamafactory.hparams.finetuning_args", "finetuning_args"),
    ("llamafactory.train.sft.workflow", "sft_workflow"),
    ("llamafactory.train.tuner", "tuner"),
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
PATCHES = _TRAINING + _WEB_UI


class Status(NamedTuple):
    """What became of one patch; ``misfit`` says why it does not fit, and is None where it was applied."""

    name: str
    what: str
    misfit: str | None


_statuses: dict[str, Status] = {}


def misfit_of(module: Any, functions: dict[str, str], used: dict[str, str]) -> str | None:
    """Says which of ``FUNCTIONS`` and ``USED`` a host's module does not meet, or None."""
    for path, expected in functions.items():
        function = _find(module, path)
        if function is None:
            return f"no function {path}"
        parameters = list(inspect.signature(function).parameters)
        if parameters != expected.split():
            return f"{path} takes {parameters}"
    for path, names in used.items():
        code = _find(module, path).__code__
        missing = [name for name in names.split() if name not in code.co_names + code.co_varnames]
        if missing:
            return f"{path} does not use {', '.join(missing)}"
    return None


def _find(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def around(owner: Any) -> Callable[[Callable], None]:
    """Decorator: puts a function into a module or class; its first argument is what had its name there before."""

    def replace(function: Callable) -> None:
        host = getattr(owner, function.__name__)

        @wraps(host)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(host, *args, **kwargs)

        @wraps(host)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            yield from function(host, *args, **kwargs)

        # Gradio asks what a function is before it calls it
        setattr(owner, function.__name__, generate if inspect.isgeneratorfunction(host) else call)

    return replace


def apply_to(module: ModuleType) -> None:
    """Applies the patch of a freshly executed host module; one that does not fit warns and leaves it alone."""
    target, name = next(patch for patch in PATCHES if patch[0] == module.__name__)
    patch = import_module(f"{__package__}.{name}")
    try:
        reason = misfit_of(module, getattr(patch, "FUNCTIONS", {}), getattr(patch, "USED", {}))
        if reason is None:
            patch.apply(module)
    except Exception as error:  # a broken patch must not take the host down
        reason = f"{type(error).__name__}: {error}"
    _statuses[name] = Status(name, (patch.__doc__ or "").partition("\n")[0].replace("``", "`"), reason)
    if reason is None:
        return
    lost = "`stage: hera`" if (target, name) in _TRAINING else "HeRA in the web UI"
    print(
        f"llamafactory-hera: the patch {name!r} does not fit this LLaMA-Factory ({reason}); {lost} may be "
        "unavailable. Run `llamafactory-hera doctor`.",
        file=sys.stderr,
    )


def statuses() -> list[Status]:
    """The state of every patch whose target was imported in this process."""
    return [_statuses[name] for _, name in PATCHES if name in _statuses]


def require() -> None:
    """Raises ``RuntimeError`` if a patch that a training run needs was tried and does not fit this host."""
    tried = [_statuses[name] for _, name in _TRAINING if name in _statuses]
    misfits = [f"{status.name} ({status.misfit})" for status in tried if status.misfit]
    if misfits:
        raise RuntimeError(
            f"stage: hera cannot run on this LLaMA-Factory: {'; '.join(misfits)}. Install a tested version "
            '(`pip install "llamafactory-hera[pinned]"`), or see `llamafactory-hera doctor`.'
        )
