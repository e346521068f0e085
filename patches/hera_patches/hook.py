"""The import hook: runs a patch right after the host module that it changes."""

import importlib.util
from importlib.machinery import ModuleSpec
from types import ModuleType

from .registry import PATCHES, apply_to

_TARGETS = frozenset(target for target, _ in PATCHES)


class PatchFinder:
    """Finds the host modules that a patch names and lets everything else pass."""

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Import protocol: the ordinary spec of a host module, its ``exec_module`` followed by the patch."""
        if name not in _TARGETS or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            apply_to(module)

        # on this one loader instance: `inspect.getsource` and `importlib.reload` keep working
        spec.loader.exec_module = exec_module
        return spec
