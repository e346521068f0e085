"""A study's record as a page with two pictures: everything that was measured, nothing concluded."""

from pathlib import Path
from typing import Any

from llamafactory_hera.files import write_json, write_text
from llamafactory_hera.selection.pictures import BLUE, GREY, ORANGE, new_figure, plain, save_figure
from results import COSTS, label
from settings import BASELINE, METHODS, TUNED
from world import CATEGORIES

_COLUMNS = (*CATEGORIES, "mean")
_MODES = {
    "llm": "Captions alone, without the image (the paper's way of selecting)",
    "mllm": "Image and caption together, as in training (base: with a projector that nothing has trained)",
}
_TITLES = {"llm": "captions alone", "mllm": "image and caption"}
_READERS = {"text_alone": "*the question alone*", "one_answer": "*one answer a category*"}
_COSTS = {
    "step_s": "step, s",
    "process_cpu_s": "CPU of the process, s",
    "process_peak_mib": "peak memory of the process, MiB",
}


_GROUPS = (("worst5", "worst-5", ORANGE, "o"), ("top5", "top-5", BLUE, "s"))
_NOTHING = {"mean": float("nan"), "low": None, "high": None}  # no seed in common with the baseline


def write_report(root: Path, report: dict[str, Any]) -> Path:
    """Writes ``report.json``, its two pictures and the page.

    Args:
        root: The study's folder.
        report: Everything that is said.

    Returns:
        The page.
    """
    write_json(root / "report.json", report)
    measured = report["measured"]
    _draw_mechanism(measured, root / "mechanism.png")
    _draw_accuracy(measured, root / "accuracy.png")
    chapters = (
        _head(report),
        _choice(report["tuning"]),
        _teacher(report["teacher"]),
        _selection(measured),
        _mechanism(measured),
        _accuracy(measured),
        _cost(measured["cost"], report),
    )
    page = root / "report.md"
    write_text(page, "\n\n".join(chapters) + "\n")
    return page


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
        _header("weight", *_COLUMNS),
    ]
    lines += [
        _row(f"{tried['weight']:g}", *(f"{100 * tried['accuracy'][name]:.1f}" for name in _COLUMNS))
        for tried in tuning["tried"]
    ]
    return "\n".join(lines)


def _teacher(control: dict[str, Any]) -> str:
    lines = [
        "## What the teacher knows",
        "",
        f"kNN accuracy (k={control['k']}) of its CLS token, %, with the share of the most frequent answer in "
        "brackets: of validation images by neighbours among training images, where colour and shape go together "
        "otherwise than in training, and of scenes with independent factors among their like.",
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


def _mechanism(measured: dict[str, Any]) -> str:
    lines = [
        "## Mechanism: MKNN of the heads that were worst and top before training",
        "",
        "On test captions, which nothing was trained or selected on.",
        "",
        "![MKNN of worst and top heads](mechanism.png)",
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


def _accuracy(measured: dict[str, Any]) -> str:
    rows = measured["accuracy"]
    lines = [
        "## Held-out accuracy by category, %",
        "",
        "![Accuracy by category](accuracy.png)",
        "",
        "Below the methods stand two that never see the image: the answer that the question had most often in "
        "training, and for every question of a category the one answer that is right most often. A method that is no "
        "better than these has not learned the category.",
        "",
        _header("", *_COLUMNS),
    ]
    lines += [
        _row(label(name), *(_interval(row[category], 1, 100) for category in _COLUMNS)) for name, row in rows.items()
    ]
    lines += [
        _row(_READERS[name], *(f"{100 * row[category]:.1f}" for category in _COLUMNS))
        for name, row in measured["floor"].items()
    ]
    lines += ["", "Minus SFT, percentage points:", "", _header("", *_COLUMNS)]
    lines += [
        _row(label(name), *(_difference(row[category], 1, 100) for category in _COLUMNS))
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


def _interval(value: dict[str, Any], digits: int, scale: float = 1, sign: str = "") -> str:
    form = f"{sign}.{digits}f"
    text = f"{scale * value['mean']:{form}}"
    if value["low"] is None:
        return text
    return f"{text} [{scale * value['low']:{form}}, {scale * value['high']:{form}}]"


def _difference(value: dict[str, Any], digits: int, scale: float = 1, to: str = "baseline") -> str:
    """The interval of a difference; nothing where no seed is in common."""
    found = value.get(f"minus_{to}")
    return "" if found is None else _interval(found, digits, scale, "+")


def _header(*cells: str) -> str:
    return _row(*cells) + "\n|---|" + "--:|" * (len(cells) - 1)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _draw_mechanism(measured: dict[str, Any], target: Path) -> None:
    """MKNN of worst and top heads for every method, with its interval, in both modes of scoring."""
    modes = measured["mechanism"]
    rows = list(next(iter(modes.values())))
    figure = new_figure(10, 1.4 + 0.36 * len(rows))
    for axes, (mode, found) in zip(figure.subplots(1, len(modes), sharey=True), modes.items(), strict=True):
        for group, name, colour, marker in _GROUPS:
            values = [found[row][group] for row in rows]
            _points(axes, values, colour, marker, name, 0.12 if group == "top5" else -0.12)
        axes.axvline(measured["chance"][mode], color="black", linestyle="--", linewidth=1, label="chance")
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        axes.set_xlabel("MKNN")
        axes.set_title(_TITLES[mode], fontsize=10)
        plain(axes)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, target)


def _draw_accuracy(measured: dict[str, Any], target: Path) -> None:
    """Each method's accuracy minus the baseline's, with its interval, by category."""
    rows = [row for row in measured["accuracy"] if row != BASELINE]
    figure = new_figure(12, 1.2 + 0.34 * max(2, len(rows)))
    for axes, name in zip(figure.subplots(1, len(_COLUMNS), sharey=True, sharex=True), _COLUMNS, strict=True):
        values = [_scaled(measured["accuracy"][row][name].get("minus_baseline", _NOTHING)) for row in rows]
        _points(axes, values, BLUE if name == "mean" else GREY, "o", None, 0)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
        sft, text = measured["accuracy"][BASELINE][name]["mean"], measured["floor"]["text_alone"][name]
        axes.set_title(f"{name}\nSFT {100 * sft:.1f} %\ntext {100 * text:.1f} %", fontsize=9)
        plain(axes)
    axes.invert_yaxis()
    figure.supxlabel(f"accuracy minus {label(BASELINE)}'s, percentage points", fontsize=9)
    save_figure(figure, target)


def _points(axes: Any, values: list[dict[str, Any]], colour: str, marker: str, name: str | None, shift: float) -> None:
    means = [value["mean"] for value in values]
    low = [value["mean"] - value["low"] if value["low"] is not None else 0 for value in values]
    high = [value["high"] - value["mean"] if value["high"] is not None else 0 for value in values]
    places = [place + shift for place in range(len(values))]
    axes.errorbar(means, places, xerr=[low, high], fmt=marker, color=colour, label=name, capsize=2, markersize=4)


def _scaled(value: dict[str, Any]) -> dict[str, Any]:
    return {key: 100 * number if number is not None and key != "count" else number for key, number in value.items()}
