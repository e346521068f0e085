"""The study is a folder of scripts, which import each other as Python does when one of them is run."""

import sys
from pathlib import Path

STUDY = Path(__file__).parents[2] / "recipes/study"
sys.path.insert(0, str(STUDY))
