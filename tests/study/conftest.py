"""The study is a folder of scripts, which import each other as Python does when one of them is run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

STUDY = Path(__file__).parents[2] / "recipes/study"
sys.path.insert(0, str(STUDY))


def main_module() -> ModuleType:
    """Its ``__main__``, under a name of its own."""
    spec = importlib.util.spec_from_file_location("hera_study_main", STUDY / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
