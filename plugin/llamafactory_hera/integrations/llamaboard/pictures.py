"""Pictures and report of a run, as the web UI shows them."""

import os
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from llamafactory_hera.heads.head_set import HeadSet
from llamafactory_hera.selection.heat_map import draw_scores
from llamafactory_hera.selection.run import FOLDER
from llamafactory_hera.selection.score_file import ScoreFile
from llamafactory_hera.selection.table import render_table

from .tasks import REPORT, heads_file
from .texts import message

Picture = tuple[Image.Image, str]


def heads_shown(path: Path, lang: str) -> tuple[str, list[Picture]]:
    """The heads of a file with their table, and their picture if the file holds scores.

    Raises:
        ValueError: The file cannot be read.
    """
    heads = HeadSet.load(path)
    if not heads.provenance.get("scores"):
        return f"{str(heads).replace(',', ' ')}\n\n{message('no_scores', lang)}", []
    scored = ScoreFile.load(path)
    # never a file that lies there: any path can be typed into the page
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "heads.png"
        draw_scores(scored, target)
        picture = _read(target)
    return f"```\n{render_table(scored)}\n```", [(picture, message("heads_picture", lang))]


def report_pictures(folder: Path, lang: str) -> list[Picture]:
    """The comparison of a run with before, and the heads that it trained."""
    heads = heads_file(folder)
    trained = heads_shown(heads, lang)[1] if heads.is_file() else []
    return [(_read(folder / FOLDER / f"{REPORT}.png"), message("report_picture", lang)), *trained]


def report_files(folder: Path) -> list[str]:
    """The comparison's page and picture, at a place from where the web UI may serve them."""
    files = [folder / FOLDER / f"{REPORT}{suffix}" for suffix in (".md", ".png")]
    files = [path for path in files if path.is_file()]
    if files and not folder.resolve().is_relative_to(os.getcwd()):
        # Gradio copies these into its cache from the system's folder for temporary files, not from anywhere
        copies = Path(tempfile.mkdtemp())
        files = [Path(shutil.copy(path, copies)) for path in files]
    return [str(path) for path in files]


def report_table(folder: Path) -> str:
    """The tables of the report as Markdown; the picture is shown elsewhere."""
    page = folder / FOLDER / f"{REPORT}.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#", "!")))


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.copy()
