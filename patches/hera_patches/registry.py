"""The list of patches, the check whether each one fits the installed host, and the state of each in this process."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

#: The release of LLaMA-Factory that the patches are tested with.
TESTED_HOST = "0.9.5"
#: The remedy for versions that do not work together.
PINNED_INSTALL = '`pip install ".[pinned]"` in a clone of llamafactory-hera'


class Patch(NamedTuple):
    """A change to one module of the host."""

    name: str
    summary: str
    for_training: bool  #: False if only the web UI needs the change.
    apply: Callable[[Any], None]  #: Changes the module, or raises an error if it does not fit.
    functions: dict[str, str]  #: Dotted names of the functions that it relies on -> their parameters.
    used: dict[str, str]  #: Dotted names of functions -> names that their code must use.


#: All patches by the module of the host that they change.
PATCHES: dict[str, Patch] = {}
#: Name of each patch whose module was imported -> the reason why it does not fit, or None if it was applied.
MISFITS: dict[str, str | None] = {}


def patch(
    host: str, functions: dict[str, str] | None = None, used: dict[str, str] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Returns a decorator that registers a function as the patch of a module; see :class:`Patch` for the arguments."""

    def register(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        summary, for_training = (apply.__doc__ or "").partition("\n")[0], apply.__module__.endswith(".training")
        PATCHES[host] = Patch(apply.__name__, summary, for_training, apply, functions or {}, used or {})
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
    MISFITS[patch.name] = misfit
    if misfit is not None:
        lost = "`stage: hera`" if patch.for_training else "HeRA in the web UI"
        print(
            f"llamafactory-hera: the patch {patch.name!r} does not fit this LLaMA-Factory ({misfit}); {lost} may not "
            "work. Run `llamafactory-hera doctor`.",
            file=sys.stderr,
        )


def require() -> None:
    """Raises ``ValueError`` if a patch that training needs does not fit this host."""
    needed = [patch.name for patch in PATCHES.values() if patch.for_training]
    reasons = [f"{name} ({MISFITS[name]})" for name in needed if MISFITS.get(name)]
    if reasons:
        raise ValueError(
            f"stage: hera: this LLaMA-Factory does not fit: {'; '.join(reasons)}. Install {TESTED_HOST} "
            f"({PINNED_INSTALL}), or run `llamafactory-hera doctor`."
        )
