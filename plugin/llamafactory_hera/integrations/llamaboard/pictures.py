"""Pictures and tables of a run as the page shows them: its curves, its heads, the comparison with before."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from llamafactory_hera.calibration.report import REPORT_FILE, render_summary
from llamafactory_hera.calibration.run import PICTURE_FILE
from llamafactory_hera.files import RUN_FOLDER, read_json
from llamafactory_hera.heads.targets import Targets
from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure
from llamafactory_hera.selection.gallery import neighbors_file, write_gallery
from llamafactory_hera.selection.report import draw_scores
from llamafactory_hera.selection.scores import ScoreFile, render_table

from .job import REPORT, heads_file
from .names import message

Picture = tuple[Image.Image, str]
_Smooth = Callable[[list[float]], list[float]]


def loss_figure(trainer_log: list[dict[str, Any]], smooth: _Smooth) -> Figure:
    """Draws the curves of a training log: both losses on an axis of their own, the MKNN with the teacher below.

    ``trainer_log`` has the lines of ``trainer_log.jsonl``, ``smooth`` is the host's.
    """
    lines = _latest(trainer_log)
    measured = any("hera_mknn" in line for line in lines)  # not every objective has it
    figure = new_figure(4.6, 5.4 if measured else 3.6)  # it is shown in a narrow column
    panels = figure.subplots(1 + measured, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + measured])[:, 0]
    losses, below = panels[0], panels[-1]
    _draw(losses, lines, "lm_loss", "LM loss", BLUE, smooth)
    hera = losses.twinx()
    _draw(hera, lines, "hera_loss", "HeRA loss", ORANGE, smooth)
    hera.spines["top"].set_visible(False)
    handles = [*losses.get_lines(), *hera.get_lines()]
    named = [handle for handle in handles if not handle.get_label().startswith("_")]
    losses.legend(handles=named, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if measured:
        _draw(below, lines, "hera_mknn", "MKNN", GREEN, smooth)
        # of each line, as batches may hold images of different numbers
        chance = {line["current_steps"]: line["hera_mknn_chance"] for line in lines if "hera_mknn_chance" in line}
        if chance:
            style = {"color": GRAY, "linestyle": "--", "linewidth": 1, "marker": "_" if len(chance) == 1 else None}
            below.plot(list(chance), list(chance.values()), label="chance", **style)
            below.legend(frameon=False, fontsize=8)
    below.set_xlabel("step")
    return figure


def _latest(trainer_log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without the steps that a resumed run has made again."""
    lines: list[dict[str, Any]] = []
    for line in trainer_log:
        # a line without a loss, such as the closing one, repeats the number of the last step
        while lines and "loss" in line and lines[-1]["current_steps"] >= line["current_steps"]:
            lines.pop()
        lines.append(line)
    return lines


def _draw(axes: Axes, lines: list[dict[str, Any]], key: str, label: str, color: str, smooth: _Smooth) -> None:
    steps = [line["current_steps"] for line in lines if key in line]
    values = [line[key] for line in lines if key in line]
    axes.plot(steps, values, color=color, alpha=0.35, linewidth=1)
    axes.plot(steps, smooth(values), color=color, label=label, marker="o" if len(steps) == 1 else None)
    axes.set_ylabel(label, color=color)
    axes.tick_params(axis="y", labelcolor=color)
    axes.spines["top"].set_visible(False)


def show_heads(path: Path, lang: str) -> tuple[str, str, list[Picture]]:
    """The names of a file's heads, and their table and picture if it holds scores; ``ValueError`` if unreadable."""
    heads = Targets.load(path, "head")
    names = str(heads).replace(",", " ")
    if not heads.provenance.get("scores"):
        return names, message("no_scores", lang), []
    scored = ScoreFile.load(path)
    # never a file that lies there: any path can be typed into the page
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "heads.png"
        draw_scores(scored, target)
        pictures = [(_read(target), message("heads_picture", lang))]
    return names, f"```\n{render_table(scored)}\n```", pictures + _galleries([path], [], lang)


def _galleries(files: Sequence[Path], names: Sequence[str], lang: str) -> list[Picture]:
    """What the worst, the median and the best head of the first file see; none for files without their neighbors."""
    if not all(neighbors_file(file).is_file() for file in files):
        return []
    with tempfile.TemporaryDirectory() as folder:
        drawn = write_gallery(files, Path(folder, "seen"), names)
        return [(_read(path), message("gallery_picture", lang, head=path.stem.partition("_")[2])) for path in drawn]


def show_calibration(folder: Path) -> tuple[str, list[Picture]]:
    """What a calibration has done, as a table and as a picture."""
    summary = render_summary(read_json(folder / REPORT_FILE))
    return f"```\n{summary}\n```", [(_read(folder / PICTURE_FILE), "RAH-LoRA")]


def report_table(folder: Path) -> str:
    """The tables of the report as Markdown; the picture is shown elsewhere."""
    lines = _report(folder, "md").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#", "!")))


def report_pictures(folder: Path, lang: str) -> list[Picture]:
    """The comparison of a run with before, what heads see, and the heads that it trained."""
    heads, after = heads_file(folder), folder / RUN_FOLDER / "scores.json"
    trained = show_heads(heads, lang)[2][:1] if heads.is_file() else []
    seen = _galleries([heads, after], ["before", "after"], lang)
    return [(_read(_report(folder, "png")), message("report_picture", lang)), *seen, *trained]


def evaluations(folder: Path) -> str:
    """The tables of a run's evaluations as Markdown; empty where there is none."""
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted(folder.glob(f"{RUN_FOLDER}/eval/*.md")))


def report_files(folder: Path) -> list[str]:
    """The comparison's pages and picture, at a place from where the web UI may serve them."""
    # Gradio copies them into its cache from the system's folder for temporary files, not from anywhere
    copies = tempfile.mkdtemp()
    return [shutil.copy(_report(folder, suffix), copies) for suffix in ("md", "png", "html")]


def _report(folder: Path, suffix: str) -> Path:
    return folder / RUN_FOLDER / f"{REPORT}.{suffix}"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()
