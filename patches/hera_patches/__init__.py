"""Run-time changes to an unmodified LLaMA-Factory, applied when the host is imported.

At every interpreter start ``llamafactory_hera.pth`` puts a finder of its own first, which imports this package and
calls ``install()`` once someone imports the host: to import even an empty package would cost more than all else at the
start. From Python 3.15 on ``llamafactory_hera.start`` calls ``install()`` itself. That only adds an import hook.
``HERA_DISABLE=1`` switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # importing `typing` would cost more than all of this module
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class PatchFinder:
    """Finds the host modules that a patch names and lets everything else pass."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Import protocol: the ordinary spec of a host module, its ``exec_module`` followed by the patches."""
        if not name.startswith("llamafactory."):
            return None
        from .registry import PATCHES, apply_to

        if name not in dict(PATCHES):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            execute(module)
            apply_to(module)

        # on this one loader instance: `inspect.getsource` and `importlib.reload` keep working
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def installed() -> bool:
    """Whether the import hook is there, or what adds it when the host is imported."""
    return any(type(finder).__name__ in ("PatchFinder", "HeraStart") for finder in sys.meta_path)


def install() -> None:
    """Adds the import hook once, unless ``HERA_DISABLE`` is set to something other than 0."""
    if os.environ.get("HERA_DISABLE", "0") in ("", "0") and PatchFinder not in map(type, sys.meta_path):
        sys.meta_path.insert(0, PatchFinder())
