"""Shows a finished selection: the table in the terminal and the picture beside the file."""

from pathlib import Path

from .heat_map import draw_scores
from .score_file import ScoreFile
from .table import render_table


def present(path: Path) -> None:
    """Prints the table of a score file and draws its picture, of the same name with the suffix ``.png``."""
    scored = ScoreFile.load(path)
    print(render_table(scored))
    draw_scores(scored, path.with_suffix(".png"))
