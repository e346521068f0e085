"""The report of a run: an HTML page that starts with the verdict."""

import math
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import torch
from matplotlib.figure import Figure

from .. import plots
from ..files import CARD, RUN_FOLDER, check_replaceable, read_json, reading, write_text
from .gallery import Neighbors, draw_gallery
from .report import Comparison, draw_scores
from .scores import command_line

_TEMPLATE = Path(__file__).with_suffix(".html")
_MARK = '<meta name="generator" content="llamafactory-hera">'


def write_report(
    comparison: Comparison, output: str | os.PathLike = "hera_report", evaluation: str | os.PathLike | None = None
) -> Path:
    """Writes the page ``OUTPUT.html`` about the run of the last file, and returns its path.

    ``evaluation`` is an output folder of ``llamafactory-hera eval``. Raises ``ValueError`` if the folder contains no
    table, or if the report would replace another page.
    """
    page = Path(f"{str(output).removesuffix('.html')}.html")
    check_replaceable({page: _MARK})
    parts = _parts(comparison) | {"accuracy": _evaluation(Path(evaluation)) if evaluation else ""}
    write_text(page, Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(parts))
    return page


def verdict(comparison: Comparison) -> tuple[str, str]:
    """Returns two texts: the agreement with the teacher in the first and the last file, and its meaning."""
    first, names, targets, rows = comparison.files[0], comparison.names, comparison.targets, comparison.rows
    (before, *_, after), noise, k = rows["mean"], _noise(comparison), first.k
    change, others = after - before, rows.get("others")
    found = (
        f"Of the {k} images that the teacher considers most similar to an image, the {len(targets.items)} "
        f"{comparison.title} {targets.plural} find {k * before:.1f} ({names[0]}) and {k * after:.1f} ({names[-1]}); "
        f"unrelated features find {k * first.chance:.1f}."
    )
    size = f"MKNN {before:.3f} → {after:.3f}, {change:+.3f}" + (f" ± {noise:.3f}" if noise else ", noise unknown")
    if not abs(change) > noise:
        meaning = f"They did not measurably move ({size}): train longer, or raise hera_weight."
        if first.provenance["keys"].get("hera_select_mode") == "llm":
            meaning += " These scores use captions alone; hera_select_mode=mllm scores both models with images."
        return found, meaning
    toward = "toward" if change > 0 else "away from"
    rest = f"; the other {targets.plural} changed by {others[-1] - others[0]:+.3f}" if others else ""
    meaning = f"They {'moved' if noise else 'seem to have moved'} {toward} the teacher ({size}){rest}."
    if abs(after - first.chance) <= noise:
        meaning += " They are at chance."
    if len(names) == 2:
        meaning += " Plain fine-tuning contributes to this; add the scores of a run without HeRA to see how much."
    return found, meaning


def _noise(comparison: Comparison) -> float:
    """Estimates, from the stored queries, the half-width of a 95% interval of the mean's change; 0 if unknown."""
    with suppress(ValueError, IndexError):
        before, after = (Neighbors.load(comparison.files[place].path) for place in (0, -1))
        changes = torch.stack([after.shares(head) - before.shares(head) for head in comparison.targets.items])
        return 2.2 * changes.mean(0).std().item() / math.sqrt(comparison.files[0].provenance["samples"])
    return 0.0


def _parts(comparison: Comparison) -> dict[str, str]:
    """Returns the parts of the page by their names in ``page.html``."""
    files, names, last, targets = comparison.files, comparison.names, comparison.files[-1], comparison.targets
    path, (found, meaning) = last.folder / RUN_FOLDER / CARD, verdict(comparison)
    facts = f"teacher {last.provenance['teacher']}"
    with reading(path, "the card of a run"):
        card = read_json(path) if path.is_file() else {}
        facts += "; {steps} steps, objective {objective}, weight {weight}, {date:.10}".format(**card) if card else ""
        training = str(card.get("command", "unknown"))
    limits = [function([file.scores for file in files]) for function in (np.nanmin, np.nanmax)]
    maps = [_image(draw_scores(file, targets.items, limits)) for file in files]
    small = gallery = reason = ""
    try:
        small, gallery = (_image(draw_gallery(files, names, targets.items[0], size)) for size in (True, False))
    except (IndexError, ValueError) as error:
        reason = f"No pictures: {error}."
    texts = {
        "title": last.folder.name,
        "facts": f"{comparison.title} {targets.plural} {', '.join(targets.names)}; {facts}",
        "found": found,
        "meaning": meaning,
        "head": targets.names[0],
        "reason": reason,
        "hidden": "hidden" if reason else "",
        "setting": files[0].setting,
        "note": f"{files[0].firmness.note} {files[0].firmness.warning}",
        "training": training,
        "files": "\n".join(f"{name}: {file.path}" for name, file in zip(names, files, strict=True)),
        "command": command_line(),
    }
    return {name: escape(text) for name, text in texts.items()} | {
        "bars": _bars({"chance": files[0].chance, **dict(zip(names, comparison.rows["mean"], strict=True))}),
        "small": small,
        "gallery": gallery,
        "table": _table(comparison.table),
        "firmness": _table(files[0].firmness.table),
        "maps": "".join(f"<h2>{escape(name)}</h2>{image}" for name, image in zip(names, maps, strict=True)),
    }


def _bars(values: dict[str, float]) -> str:
    """Renders a bar for each value."""
    colors, widest = plots.series_colors(list(values)), max(values.values())
    style = {name: f"background: {colors[name]}; width: {75 * value / widest:.1f}%" for name, value in values.items()}
    return "".join(
        f'<b>{escape(name)}</b><span><i style="{style[name]}"></i>{value:.3f}</span>' for name, value in values.items()
    )


def _evaluation(folder: Path) -> str:
    """Renders the tables of an evaluation: scores, and differences from the first model with their intervals."""
    page = ""
    with reading(folder, "the output folder of llamafactory-hera eval"):
        for content in map(read_json, sorted(folder.glob("*.json"))):
            models, rows = content["models"], content["rows"]
            table = [[content["suite"], "n", *models, *(f"{name} − {models[0]} [95%]" for name in models[1:])]]
            # averages, or the first score of each task
            firsts = {row["key"].partition("/")[0]: row for row in rows[::-1]}.values()
            for row in [row for row in rows if row["n"] is None] or list(firsts)[::-1]:
                cells = [f"{row['values'].get(name, math.nan):.1f}" for name in models]
                ends = (row["differences"].get(name, [math.nan] * 3) for name in models[1:])
                cells += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*three) for three in ends]
                table.append([row["title"], str(row["n"] or ""), *cells])
            page += f"<h2>Accuracy</h2><div class=scroll>{_table(table)}</div>"
    if not page:
        raise ValueError(f"--eval: {folder} contains no table; give the output folder of llamafactory-hera eval.")
    return page


def _table(rows: Sequence[Sequence[str]]) -> str:
    page = f"<table>{''.join('<tr>' + ''.join(f'<td>{escape(cell)}' for cell in row) for row in rows)}</table>"
    return re.sub(r"(?<!\w)-(?=\d)", "−", page)


def _image(figure: Figure) -> str:
    return f'<img alt="" src="data:image/webp;base64,{b64encode(plots.render(figure, "webp")).decode()}">'
