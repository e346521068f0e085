"""Changes to LLaMA-Factory (the host) in memory; its files on disk stay unchanged.

``llamafactory_hera_patches.pth`` runs at every start of Python, and adds a small import hook, which calls
``install`` as soon as a program imports the host. From Python 3.15 on, ``llamafactory_hera_patches.start`` calls
the function directly. ``install`` adds ``PatchFinder``, which changes each module of the host right after its import.
"""

import os
import sys

TYPE_CHECKING = False  # importing `typing` would take longer than the rest of this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from .registry import Patch


class PatchFinder:
    """An import hook for the modules of the host that have a patch; it ignores all other modules."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Returns the usual spec of a module of the host, with a loader that also applies the patch."""
        if not name.startswith("llamafactory.") or name not in patches():
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            from .registry import apply_to

            execute(module)
            apply_to(module)

        # changes only this loader object, so `inspect.getsource` and `importlib.reload` keep working
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def patches() -> "dict[str, Patch]":
    """Returns the patches, keyed by the module of the host that each patch changes."""
    from . import registry, training, web_ui  # noqa: F401  (the last two register their patches)

    return registry.PATCHES


def installed() -> bool:
    """Returns whether one of the two import hooks is active."""
    return any(type(finder).__name__ in ("PatchFinder", "HeraStart") for finder in sys.meta_path)


def disabled() -> bool:
    """Returns whether ``HERA_DISABLE`` is set to something other than 0."""
    return os.environ.get("HERA_DISABLE", "0") not in ("", "0")


def install() -> None:
    """Adds the import hook, unless it is already active or disabled."""
    if not disabled() and PatchFinder not in map(type, sys.meta_path):
        sys.meta_path.insert(0, PatchFinder())
