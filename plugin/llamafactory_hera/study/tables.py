"""A study's record as Markdown: everything that was measured, nothing concluded."""

from typing import Any

from .control import NEIGHBOURS
from .methods import BASELINE, METHODS, TUNED
from .questions import CATEGORIES
from .results import COSTS, label

_MODES = {
    "llm": "Captions alone, without the image (the paper's way of selecting)",
    "mllm": "Image and caption together, as in training (base: with a projector that nothing has trained)",
}
_READERS = {"text_alone": "*the question alone*", "one_answer": "*one answer a category*"}
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
    parts += [_selection(measured), _mechanism(measured, figures["mechanism"])]
    parts.append(_accuracy(measured, figures["accuracy"]))
    parts.append(_cost(measured["cost"], report))
    return "\n\n".join(parts) + "\n"


def _head(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    seeds = ", ".join(map(str, settings["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    hours = report["elapsed_s"] / 3600
    workers = " or ".join(map(str, machine["workers"]))
    missing = report["measured"]["missing"]
    return "\n".join(
        (
            "# Study",
            "",
            f"{report['measured']['runs']} runs, seeds {seeds}; {report['date']}; {workers} runs side by "
            f"side on {machine['cores']} cores ({machine['processor']}), {machine['load']:.1f} mean load at the end; "
            f"{hours:.2f} h of finished work. {versions}.",
            "",
            f"Command: `{report['command']}`",
            "",
            *([f"**Failed, and in no row below: {', '.join(missing)}.**", ""] if missing else []),
            f"{settings['scenes']} training scenes, {settings['questions']} questions of each category on scenes with "
            "held-out combinations of shape, colour and cell. "
            f"Steps: {settings['language_steps']} of text alone, {settings['stage1_steps']} of stage 1, "
            f"{settings['stage2_steps']} of stage 2, at batch {settings['batch_size']}. Brackets hold 95 % intervals "
            "over seeds (Student's t); those of differences are paired by seed. An interval that holds 0 does not "
            "show a difference. They are not corrected for their number: of a hundred, five miss by chance. Data, "
            "questions, vision tower and teacher are the same for all seeds, so that an interval covers the language "
            "model, the projector, the order of samples and the draw of random heads alone.",
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


def _selection(measured: dict[str, Any]) -> str:
    found = measured["selection"]
    lines = [
        "## The heads",
        "",
        "MKNN of the pre-trained language model's heads on the training captions that they were selected on, and the "
        "rank correlation (Spearman) of all heads' scores there with those on test captions: near 1 the choice of "
        "worst heads is a fact of the model, near 0 of the captions.",
        "",
        _header("seed", "worst-5", "all", "top-5", "rank correlation", "worst-5", "top-5"),
    ]
    for seed, heads in measured["heads"].items():
        scores = [f"{found[name]['by_seed'][seed]:.4f}" for name in ("worst5", "all", "top5")]
        names = [" ".join(heads[group]) for group in ("worst5", "top5")]
        lines.append(_row(seed, *scores, f"{found['rank_correlation']['by_seed'][seed]:.2f}", *names))
    return "\n".join(lines)


def _mechanism(measured: dict[str, Any], figure: str) -> str:
    lines = [
        "## Mechanism: MKNN of the heads that were worst and top before training",
        "",
        "On test captions, which nothing was trained or selected on.",
        "",
        f"![MKNN of worst and top heads]({figure})",
    ]
    groups, differences = {"worst5": "worst-5", "top5": "top-5", "all": "all"}, {"base": "base", "baseline": "SFT"}
    for mode, rows in measured["mechanism"].items():
        lines += ["", f"{_MODES[mode]}; chance {measured['chance'][mode]:.4f}:", ""]
        what = ["MKNN", *(f"minus {name}" for name in differences.values())]
        lines.append(_header("", *(f"{group}, {name}" for group in groups.values() for name in what)))
        for name, row in rows.items():
            cells = []
            for group in groups:
                cells += [_interval(row[group], 4), *(_difference(row[group], 4, to=other) for other in differences)]
            lines.append(_row(label(name), *cells))
    return "\n".join(lines)


def _accuracy(measured: dict[str, Any], figure: str) -> str:
    rows = measured["accuracy"]
    lines = [
        "## Held-out accuracy by category, %",
        "",
        f"![Accuracy by category]({figure})",
        "",
        "Below the methods stand two that never see the image: the answer that the question had most often in "
        "training, and for every question of a category the one answer that is right most often. A method that is no "
        "better than these has not learned the category.",
        "",
        _header("", *CATEGORIES, "mean"),
    ]
    lines += [
        _row(label(name), *(_interval(row[category], 1, 100) for category in (*CATEGORIES, "mean")))
        for name, row in rows.items()
    ]
    lines += [
        _row(_READERS[name], *(f"{100 * row[category]:.1f}" for category in (*CATEGORIES, "mean")))
        for name, row in measured["floor"].items()
    ]
    lines += ["", "Minus SFT, percentage points:", "", _header("", *CATEGORIES, "mean")]
    lines += [
        _row(label(name), *(_difference(row[category], 1, 100) for category in (*CATEGORIES, "mean")))
        for name, row in rows.items()
        if name != BASELINE
    ]
    return "\n".join(lines)


def _cost(rows: dict[str, Any], report: dict[str, Any]) -> str:
    workers = " or ".join(map(str, report["machine"]["workers"]))
    lines = [
        "## Cost of stage 2, relative to SFT",
        "",
        f"Taken from the runs themselves, {workers} side by side with one thread each, so that a run's pace depends "
        "on its neighbour's; peak memory and CPU are of the whole process, with imports and predictions. "
        "The teacher's features of all images were computed beforehand, which no row is charged for; VIRAL needs "
        "those of patches and runs the teacher in every step. × SFT: ratios of the runs of a seed.",
        "",
        _header("", *(f"{_COSTS[name]}{what}" for name in COSTS for what in ("", ", × SFT"))),
    ]
    for name, row in rows.items():
        cells = []
        for quantity in COSTS:
            if quantity not in row:  # no seed in common with SFT
                cells += ["", ""]
                continue
            mean = row[quantity]["mean"]
            ratio = "" if name == BASELINE else _interval(row[quantity]["over_baseline"], 3)
            cells += [f"{mean:.3g}" if mean < 100 else f"{mean:.0f}", ratio]
        lines.append(_row(label(name), *cells))
    return "\n".join(lines)


def _interval(value: dict[str, Any], digits: int, scale: float = 1) -> str:
    text = f"{scale * value['mean']:.{digits}f}"
    if value["low"] is None:
        return text
    return f"{text} [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def _difference(value: dict[str, Any], digits: int, scale: float = 1, to: str = "baseline") -> str:
    if f"minus_{to}" not in value:
        return ""
    found = value[f"minus_{to}"]
    text = f"{scale * found['mean']:+.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:+.{digits}f}, {scale * found['high']:+.{digits}f}]"


def _header(*cells: str) -> str:
    return _row(*cells) + "\n|---|" + "--:|" * (len(cells) - 1)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
