"""One HTML page about a run, for a browser without a network: nothing on it is fetched, and it has no script."""

import logging
import math
import os
from base64 import b64encode
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from ..files import CARD, read_json, write_text
from ..heads.targets import Target
from ..plots import BLUE, GRAY, GREEN, ORANGE, inline_svg, new_figure, plain
from .gallery import default_targets, draw_gallery
from .pictures import draw_comparison
from .scores import Comparison, ScoreFile, command_line, compare

logger = logging.getLogger("llamafactory_hera")

_PANELS = {
    "language-modeling loss": {"lm_loss": BLUE},
    "alignment loss": {"hera_loss": ORANGE},
    "MKNN in batches (gray: chance)": {"hera_mknn": GREEN, "hera_mknn_chance": GRAY},
    "temperature τ": {"hera_temperature": BLUE},
}
_NO_FACTS = ("curves", "log", "log_lines", "command", "versions", "paper")  # shown elsewhere, or not at all
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em; color: #222 }}
img, svg {{ max-width: 100%; height: auto }}
.maps {{ display: flex; flex-wrap: wrap; gap: 1.5em }}
.map {{ border-collapse: collapse; font-size: 11px }}
.map td {{ width: 15px; height: 15px; padding: 0; border: 1px solid #fff }}
.map td.chosen {{ outline: 2px solid #D55E00; outline-offset: -2px }}
.facts th {{ text-align: left; vertical-align: top; padding-right: 1.5em; font-weight: normal; color: #666 }}
pre {{ background: #f4f4f4; padding: .6em; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_page(
    paths: Sequence[str | os.PathLike],
    target: str | os.PathLike,
    names: Sequence[str] = (),
    aligned: str | None = None,
) -> Path:
    """Compares score files as :func:`~.scores.compare` does, in a page of its own; returns its path.

    What was trained is read from ``card.json`` beside ``aligned`` or, last first, beside a score file.

    Raises:
        ValueError: As there; or the page cannot be written, or would replace a file that is no page.
    """
    comparison = compare(paths, names, aligned)
    if os.path.isfile(target) and not Path(target).read_bytes().startswith(_PAGE[:9].encode()):
        raise ValueError(f"--html: {target} is there and is no HTML page, and would be lost; give another path.")
    folders = ([Path(aligned).parent] if aligned else []) + [file.path.parent for file in comparison.files[::-1]]
    path = next((folder / CARD for folder in folders if (folder / CARD).is_file()), None)
    card = read_json(path) if path else {}
    title = f"HeRA: {comparison.files[-1].provenance['model']}"
    write_text(target, _PAGE.format(title=escape(title), body="\n".join(_parts(comparison, card))))
    return Path(target)


def _parts(comparison: Comparison, card: dict[str, Any]) -> Iterable[str]:
    first, what = comparison.files[0], comparison.files[0].chosen.what
    facts, (group, framed) = first.provenance, next(iter(comparison.groups.items()))
    yield (
        f"<p>MKNN against {escape(facts['teacher'])} on {facts['samples']} samples of {escape(facts['dataset'])}, "
        f"k = {facts['keys']['hera_select_k']}, mode {facts['keys']['hera_select_mode']}. "
        f" Unrelated features reach {first.chance:.4f}.</p>"
    )
    yield "<h2>What was trained</h2>"
    yield _facts(card) if card else f"<p>No {CARD} lies beside the scores: a finished run writes it.</p>"
    yield f"<h2>All {what} before and after</h2><p>Framed: {group}.</p><div class=maps>"
    known = np.concatenate([file.of(first.chosen.granularity).ravel() for file in comparison.files])
    limits = float(np.nanmin(known)), float(np.nanmax(known))
    for name, file in zip(comparison.names, comparison.files, strict=True):
        yield _heat_map(name, file, limits, framed)
    yield f"</div><p>From {limits[0]:.3f} (dark) to {limits[1]:.3f} (light); values where the pointer rests.</p>"
    yield f"<h2>{' and '.join(comparison.groups)}</h2>"
    yield inline_svg(draw_comparison(comparison), "MKNN of the least and most aligned, before and after")
    if card.get("log"):
        yield f"<h2>Training</h2>{_curves(card['log'])}"
    yield "<h2>What a head sees</h2>"
    # the first that is shown above, which need not be the worst, the median and the best
    shown = [Target.parse(next(iter(framed)), first.chosen.granularity)]
    try:
        shown += default_targets(first)[1:]
        for target in shown:
            drawn, figure = BytesIO(), draw_gallery(comparison.files, comparison.names, target)
            figure.savefig(drawn, format="jpeg", dpi=110, pil_kwargs={"quality": 85})
            source = b64encode(drawn.getvalue()).decode()
            yield f'<p><img alt="Nearest images of {target}" src="data:image/jpeg;base64,{source}"></p>'
    except ValueError as error:
        logger.warning(f"The page lacks pictures of nearest images: {error}")
        yield f"<p>{escape(str(error))}</p>"
    yield "<h2>How it was made</h2>"
    yield _facts(card.get("versions") or facts.get("versions", {}))
    for label, command in (("The run", card.get("command")), ("This page", command_line())):
        yield f"<p>{label}</p><pre>{escape(command)}</pre>" if command else ""


def _facts(facts: Mapping[str, Any]) -> str:
    """A table; what is nested becomes rows of its own."""
    rows = []
    for name, value in facts.items():
        if name not in _NO_FACTS:
            inner = _facts(value) if isinstance(value, Mapping) else ""
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append(f"<tr><th>{escape(name)}</th><td>{inner or escape(shown)}</td></tr>")
    return f"<table class=facts>{''.join(rows)}</table>"


def _heat_map(name: str, file: ScoreFile, limits: tuple[float, float], framed: Container[str]) -> str:
    """A table with a row for each layer, on a color scale that all files share."""
    scores = np.atleast_2d(file.of(file.chosen.granularity).T).T  # layers are one column
    by_head, rows = file.chosen.granularity == "head", []
    for layer, values in enumerate(scores):
        cells = []
        for head, value in enumerate(values.tolist()):
            target = Target(layer, head if by_head else None)
            share = (value - limits[0]) / max(limits[1] - limits[0], 1e-9)
            color = "#fff" if math.isnan(value) else to_hex(colormaps["cividis"](share))
            chosen = " class=chosen" if str(target) in framed else ""
            tip = f"{target} {value:.4f}, {value / file.chance:.2f} × chance"
            cells.append(f'<td{chosen} style="background:{color}" title="{tip}"></td>')
        rows.append(f"<tr><th>L{layer}</th>{''.join(cells)}</tr>")
    return f"<div><h3>{escape(name)}</h3><table class=map>{''.join(rows)}</table></div>"


def _curves(log: list[dict[str, float]]) -> str:
    shown = {title: curves for title, curves in _PANELS.items() if any(next(iter(curves)) in line for line in log)}
    figure = new_figure(3.4 * len(shown), 2.6)
    for axes, (title, curves) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for key, color in curves.items():
            lines = [line for line in log if key in line]
            axes.plot([line["step"] for line in lines], [line[key] for line in lines], color=color, marker=".")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        plain(axes)
    return inline_svg(figure, f"Over the steps: {', '.join(shown)}")
