"""The list of patches, the check that each patch fits the installed host, and each patch's state in this process."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

#: Whether llamafactory-hera is installed; the patches do nothing without it.
_USABLE = find_spec("llamafactory_hera") is not None
if not _USABLE:
    print(
        "llamafactory-hera-patches is installed without llamafactory-hera, so `stage: hera` is missing. Install "
        "llamafactory-hera, or run `pip uninstall llamafactory-hera-patches`.",
        file=sys.stderr,
    )


class Patch(NamedTuple):
    """A change to one module of the host."""

    name: str
    summary: str
    for_training: bool  #: False if only the web UI needs the change.
    apply: Callable[[Any], None]  #: Changes the module, or raises an error if the module does not fit.
    functions: dict[str, str]  #: Dotted names of functions that the patch relies on -> their parameters.
    used: dict[str, str]  #: Dotted names of functions -> names that their code must use.


#: The patches, keyed by the module of the host that each patch changes.
PATCHES: dict[str, Patch] = {}
#: Name of each patch whose module was imported -> the reason why it does not fit, or None if it was applied.
MISFITS: dict[str, str | None] = {}


def patch(
    host: str, functions: dict[str, str] | None = None, used: dict[str, str] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Returns a decorator that registers a function as the patch of a module; see ``Patch`` for the arguments."""

    def register(apply: Callable[[Any], None]) -> Callable[[Any], None]:
        summary, for_training = (apply.__doc__ or "").partition("\n")[0], apply.__module__.endswith(".training")
        if _USABLE:
            PATCHES[host] = Patch(apply.__name__, summary, for_training, apply, functions or {}, used or {})
        return apply

    return register


def around(owner: Any) -> Callable[[Callable], None]:
    """Returns a decorator that replaces the owner's function of the same name, and passes the original to it."""

    def replace(function: Callable) -> None:
        host = getattr(owner, function.__name__)

        @wraps(host)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(host, *args, **kwargs)

        setattr(owner, function.__name__, call)

    return replace


def apply_to(module: ModuleType) -> None:
    """Applies the patch of a module that was just imported; if the patch does not fit, warns and changes nothing."""
    patch = PATCHES[module.__name__]
    MISFITS[patch.name] = None
    try:
        _check(module, patch)
        patch.apply(module)
    except Exception as error:  # an error here must not stop the host
        misfit = MISFITS[patch.name] = f"{type(error).__name__}: {error}"
        lost = "`stage: hera`" if patch.for_training else "HeRA in the web UI"
        print(
            f"llamafactory-hera: the patch {patch.name!r} does not fit this LLaMA-Factory ({misfit}); {lost} may not "
            "work. Run `llamafactory-hera doctor`.",
            file=sys.stderr,
        )


def _check(module: ModuleType, patch: Patch) -> None:
    """Raises an error for the first requirement of a patch that the module does not meet."""
    for path, expected in patch.functions.items():
        parameters = list(inspect.signature(attrgetter(path)(module)).parameters)
        if parameters != expected.split():
            raise TypeError(f"{path} takes {parameters}")
    for path, names in patch.used.items():
        code = attrgetter(path)(module).__code__
        if missing := [name for name in names.split() if name not in code.co_names + code.co_varnames]:
            raise NameError(f"{path} does not use {', '.join(missing)}")


def require() -> None:
    """Raises ``ValueError`` if a patch that training needs does not fit this host."""
    from llamafactory_hera.integrations.llamafactory import PINNED_INSTALL, TESTED_HOST

    training = [patch.name for patch in PATCHES.values() if patch.for_training]
    if reasons := [f"{name} ({MISFITS[name]})" for name in training if MISFITS.get(name)]:
        raise ValueError(
            f"stage: patches do not fit this LLaMA-Factory: {'; '.join(reasons)}. Install version {TESTED_HOST} "
            f"({PINNED_INSTALL}), or run `llamafactory-hera doctor`."
        )
