"""The list of patches, the check whether each one fits the installed host, and the state of each in this process."""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

#: The release of LLaMA-Factory that the patches are tested with.
TESTED_HOST = "0.9.5"
#: The remedy for versions that do not work together.
PINNED_INSTALL = '`pip install ".[pinned]"` in a clone of llamafactory-hera'


@dataclass(frozen=True)
class Patch:
    """A change to one module of the host.

    Attributes:
        host: Name of the module.
        apply: Makes the change; raises an error where it does not fit.
        functions: Functions that the change relies on, by dotted name, with their parameters separated by spaces.
        used: Names that a function of the host must use in its code, by the function's dotted name.
    """

    host: str
    apply: Callable[[Any], None]
    functions: dict[str, str]
    used: dict[str, str]

    @property
    def name(self) -> str:
        """The name in messages."""
        return self.apply.__name__

    @property
    def summary(self) -> str:
        """A sentence that describes the change."""
        return (self.apply.__doc__ or "").partition("\n")[0]

    @property
    def for_training(self) -> bool:
        """Whether a training run needs the change; otherwise it is for the web UI alone."""
        return self.apply.__module__.endswith(".training")


#: All registered patches by the module of the host that they change.
PATCHES: dict[str, Patch] = {}
#: For each patch whose module was imported: the reason why it does not fit, or None where it was applied.
_misfits: dict[str, str | None] = {}


def patch(
    host: str, functions: dict[str, str] | None = None, used: dict[str, str] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Returns a decorator that registers a function as the patch of a module; see :class:`Patch` for the arguments."""

    def register(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        PATCHES[host] = Patch(host, apply, functions or {}, used or {})
        return apply

    return register


def around(owner: Any) -> Callable[[Callable], None]:
    """Returns a decorator that replaces the function of the same name in a module or class.

    The replacement receives the original function as its first argument.
    """

    def replace(function: Callable) -> None:
        host = getattr(owner, function.__name__)

        @wraps(host)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(host, *args, **kwargs)

        setattr(owner, function.__name__, call)

    return replace


def misfit_of(module: Any, functions: dict[str, str], used: dict[str, str]) -> str | None:
    """Describes the first requirement that a module of the host does not meet, or returns None."""
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


def apply_to(module: ModuleType) -> None:
    """Applies the patch of a module that was just imported; if it does not fit, warns and changes nothing."""
    patch = PATCHES[module.__name__]
    try:
        misfit = misfit_of(module, patch.functions, patch.used)
        if misfit is None:
            patch.apply(module)
    except Exception as error:  # an error here must not stop the host
        misfit = f"{type(error).__name__}: {error}"
    _misfits[patch.name] = misfit
    if misfit is not None:
        lost = "`stage: hera`" if patch.for_training else "HeRA in the web UI"
        print(
            f"llamafactory-hera: the patch {patch.name!r} does not fit this LLaMA-Factory ({misfit}); {lost} may not "
            "work. Run `llamafactory-hera doctor`.",
            file=sys.stderr,
        )


def statuses() -> Iterator[tuple[Patch, str | None]]:
    """Yields every patch whose module was imported, and the reason why it does not fit, or None."""
    for patch in PATCHES.values():
        if patch.name in _misfits:
            yield patch, _misfits[patch.name]


def require() -> None:
    """Raises ``ValueError`` if a patch that training needs does not fit this host."""
    misfits = [f"{patch.name} ({misfit})" for patch, misfit in statuses() if misfit and patch.for_training]
    if misfits:
        raise ValueError(
            f"stage: hera: this LLaMA-Factory does not fit: {'; '.join(misfits)}. Install {TESTED_HOST} "
            f"({PINNED_INSTALL}), or run `llamafactory-hera doctor`."
        )
