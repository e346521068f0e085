"""A study's record as Markdown: everything that was measured, nothing concluded."""

from typing import Any

from .control import NEIGHBOURS
from .methods import BASELINE, METHODS, TUNED
from .questions import CATEGORIES
from .results import COSTS, label

_MODES = {
    "llm": "Captions alone, without the image (the paper's way of selecting)",
    "mllm": "Image and caption together, as in training",
}
_COSTS = {
    "step_s": "step, s",
    "process_cpu_s": "CPU of the process, s",
    "process_peak_mib": "peak memory of the process, MiB",
}


def render(report: dict[str, Any], figures: dict[str, str]) -> str:
    """The page.

    Args:
        report: What ``report.json`` holds.
        figures: Picture files by ``mechanism`` and ``accuracy``, relative to the page.
    """
    parts = [_head(report), _choice(report["tuning"]), _teacher(report["teacher"])]
    measured = report["measured"]
    parts.append(_mechanism(measured, figures["mechanism"]))
    parts.append(_accuracy(measured, figures["accuracy"]))
    parts.append(_cost(measured["cost"], report))
    return "\n\n".join(parts) + "\n"


def _head(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    seeds = ", ".join(map(str, settings["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    hours = report["elapsed_s"] / 3600
    return "\n".join(
        (
            "# Study",
            "",
            f"{report['measured']['runs']} runs, seeds {seeds}; {report['date']}; {machine['workers']} runs side by "
            f"side on {machine['cores']} cores ({machine['processor']}), {machine['load']:.1f} mean load at the end; "
            f"{hours:.2f} h of finished work. {versions}.",
            "",
            f"Command: `{report['command']}`",
            "",
            f"{settings['scenes']} training scenes, {settings['questions']} questions of each category on scenes with "
            "held-out combinations of shape, colour and cell. "
            f"Steps: {settings['language_steps']} of text alone, {settings['stage1_steps']} of stage 1, "
            f"{settings['stage2_steps']} of stage 2, at batch {settings['batch_size']}. Brackets hold 95 % intervals "
            "over seeds (Student's t); those of differences to SFT are paired by seed. An interval that holds 0 shows "
            "no difference at this number of seeds.",
        )
    )


def _choice(tuning: dict[str, Any]) -> str:
    lines = [
        "## What was chosen on the validation split",
        "",
        f"The weight of {METHODS[TUNED].label}, seed {tuning['tried'][0]['seed']}, which no row below uses; the best "
        f"mean over categories was frozen for every row that does not say otherwise: **{tuning['chosen']:g}**.",
        "",
        _header("weight", *CATEGORIES, "mean"),
    ]
    lines += [
        _row(f"{tried['weight']:g}", *(f"{100 * tried['accuracy'][name]:.1f}" for name in (*CATEGORIES, "mean")))
        for tried in tuning["tried"]
    ]
    return "\n".join(lines)


def _teacher(control: dict[str, Any]) -> str:
    lines = [
        "## What the teacher knows",
        "",
        f"kNN accuracy (k={NEIGHBOURS}) of its CLS token, %, with the share of the most frequent answer in brackets: "
        "of validation images by neighbours among training images, where colour and shape go together otherwise than "
        "in training, and of scenes with independent factors among their like.",
        "",
        _header("scenes", *next(iter(control["scenes"].values()))),
    ]
    lines += [
        _row(name, *(f"{100 * cell['accuracy']:.1f} ({100 * cell['majority']:.1f})" for cell in found.values()))
        for name, found in control["scenes"].items()
    ]
    return "\n".join(lines)


def _mechanism(measured: dict[str, Any], figure: str) -> str:
    lines = [
        "## Mechanism: MKNN of the heads that were worst and top before training",
        "",
        "On test captions, which nothing was trained or selected on. Heads by seed: "
        + "; ".join(
            f"{seed}: worst {' '.join(groups['worst5'])}, top {' '.join(groups['top5'])}"
            for seed, groups in measured["heads"].items()
        )
        + ".",
        "",
        f"![MKNN of worst and top heads]({figure})",
    ]
    groups = ("worst5", "top5", "all")
    for mode, rows in measured["mechanism"].items():
        lines += ["", f"{_MODES[mode]}; chance {measured['chance'][mode]:.4f}:", ""]
        lines.append(_header("", *(f"{name}, {what}" for name in groups for what in ("MKNN", "minus SFT"))))
        for name, row in rows.items():
            cells = [cell for group in groups for cell in (_interval(row[group], 4), _difference(row[group], 4))]
            lines.append(_row(label(name), *cells))
    return "\n".join(lines)


def _accuracy(measured: dict[str, Any], figure: str) -> str:
    rows = measured["accuracy"]
    lines = [
        "## Held-out accuracy by category, %",
        "",
        f"![Accuracy by category]({figure})",
        "",
        _header("", *CATEGORIES, "mean"),
    ]
    lines += [
        _row(label(name), *(_interval(row[category], 1, 100) for category in (*CATEGORIES, "mean")))
        for name, row in rows.items()
    ]
    lines += ["", "Minus SFT, percentage points:", "", _header("", *CATEGORIES, "mean")]
    lines += [
        _row(label(name), *(_difference(row[category], 1, 100) for category in (*CATEGORIES, "mean")))
        for name, row in rows.items()
        if name != BASELINE
    ]
    return "\n".join(lines)


def _cost(rows: dict[str, Any], report: dict[str, Any]) -> str:
    workers = report["machine"]["workers"]
    lines = [
        "## Cost of stage 2, relative to SFT",
        "",
        f"Taken from the runs themselves, {workers} side by side with one thread each, so that a run's pace depends "
        "on its neighbour's; peak memory and CPU are of the whole process, with imports and predictions.",
        "",
        _header("", *(f"{_COSTS[name]}{what}" for name in COSTS for what in ("", ", × SFT"))),
    ]
    for name, row in rows.items():
        cells = []
        for quantity in COSTS:
            mean = row[quantity]["mean"]
            cells += [f"{mean:.3g}" if mean < 100 else f"{mean:.0f}", f"{mean / rows[BASELINE][quantity]['mean']:.3f}"]
        lines.append(_row(label(name), *cells))
    return "\n".join(lines)


def _interval(value: dict[str, Any], digits: int, scale: float = 1) -> str:
    text = f"{scale * value['mean']:.{digits}f}"
    if value["low"] is None:
        return text
    return f"{text} [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def _difference(value: dict[str, Any], digits: int, scale: float = 1) -> str:
    if "minus_baseline" not in value:
        return ""
    found = value["minus_baseline"]
    text = f"{scale * found['mean']:+.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:+.{digits}f}, {scale * found['high']:+.{digits}f}]"


def _header(*cells: str) -> str:
    return _row(*cells) + "\n|---|" + "--:|" * (len(cells) - 1)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
