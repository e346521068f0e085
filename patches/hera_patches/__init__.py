"""Run-time changes to an unmodified LLaMA-Factory, applied when the host is imported.

``install()`` is called at interpreter start by ``llamafactory_hera.pth`` (``.start`` from Python 3.15 on). It only
adds an import hook; the host is neither imported nor searched for. ``HERA_DISABLE=1`` switches it off.
"""

import os
import sys


def install() -> None:
    """Adds the import hook once, unless ``HERA_DISABLE`` is set to something other than 0."""
    if os.environ.get("HERA_DISABLE", "0") not in ("", "0"):
        return
    from .hook import PatchFinder

    if not any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PatchFinder())
