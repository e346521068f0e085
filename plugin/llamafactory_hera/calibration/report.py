"""The report of a calibration: ``calibration.json``, a summary for the terminal, and ``calibration.png``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..heads.targets import Target
from ..plots import heat_map, new_figure, save_figure
from .plan import Outcome, Plan, Trial
from .profile import Profile
from .settings import RahConfig

REPORT_FILE = "calibration.json"
_CELL = 0.2  # inches


def describe(
    profile: Profile, plan: Plan, outcome: Outcome, config: RahConfig, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of ``calibration.json``; ``provenance`` states the model, the data and the samples."""
    saliency, influence = profile.saliency, profile.influence(config.caf_lambda)
    trials = {head: trial for trial in outcome.trials for head in trial.update.heads}
    tried = [trial for trial in outcome.trials if trial.tried]
    reasons = {
        "rah_delta: 0 allows no change of the model": config.delta == 0,
        "no head in the calibrated layers has low I-SAL and high CAF": not plan.heads,
        "no chosen head has an anchor: no head within two layers has enough I-SAL (rah_beta)": not plan.updates,
        "no update remains: all were rolled back, or their heads already equal their anchors": True,
    }
    return {
        "calibrated": [str(head) for update, _ in outcome.accepted for head in update.heads],
        "nothing_because": None if outcome.accepted else next(reason for reason, holds in reasons.items() if holds),
        "kl": {
            "total": outcome.kl,
            "total_before_roll_back": outcome.kl_before,
            "delta": config.delta if config.update == "calibrate" else None,
            "roll_back_rate": round(sum(trial.alpha == 0 for trial in tried) / max(1, len(tried)), 6),
        },
        "heads": [
            {"head": str(head), "isal": saliency[head].item(), "caf": influence[head].item()}
            | {"anchors": [anchor._asdict() | {"head": str(anchor.head)} for anchor in plan.anchors[head]]}
            | _outcome_of(trials.get(head), "not tried" if plan.anchors[head] else "no anchor")
            for head in plan.heads
        ],
        "settings": config.keys(),
        "provenance": dict(provenance),
        "isal": _rows(saliency),
        "caf": _rows(influence),
    }


def _outcome_of(trial: Trial | None, state_without: str) -> dict[str, Any]:
    """Returns the outcome of a head's update; ``state_without`` is the state of a head without an update."""
    steps = trial.tried if trial else ()
    outcome = {"state": trial.state if trial else state_without, "alpha": trial.alpha if trial else 0.0}
    return outcome | {"kl": steps[-1][1] if steps else None, "tried": [{"alpha": a, "kl": kl} for a, kl in steps]}


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


def render_summary(report: dict[str, Any]) -> str:
    """Renders the content of ``calibration.json`` in a few lines."""
    heads, kl = report["heads"], report["kl"]
    changed = f"{len(report['calibrated'])} {report['settings']['rah_update']}d"
    lines = [f"RAH-LoRA: {len(heads)} of {np.size(report['caf'])} heads chosen, {changed}"]
    lines.append(f"{'head':>7} {'I-SAL':>7} {'CAF':>9} {'alpha':>8} {'KL alone':>9}  state, anchors")
    for head in heads:
        alone = "" if head["kl"] is None else f"{head['kl']:.6f}"
        scores = f"{head['isal']:7.2f} {head['caf']:9.4f} {head['alpha']:8.5f} {alone:>9}"
        anchors = "".join(f" {anchor['head']}" for anchor in head["anchors"])
        lines.append(f"{head['head']:>7} {scores}  {head['state']}{anchors and ','}{anchors}")
    if report["nothing_because"] is not None:
        return "\n".join([*lines, f"No adapter: {report['nothing_because']}."])
    bound = "no bound" if kl["delta"] is None else f"bound {kl['delta']:g}"
    lines.append(f"KL divergence of all updates together: {kl['total']:.6f} ({bound})")
    return "\n".join([*lines, f"Rolled back: {kl['roll_back_rate']:.1%} of the updates"])


def draw_calibration(report: dict[str, Any], path: Path) -> None:
    """Draws CAF and I-SAL of every head, with the chosen heads and anchors marked (paper, fig. 3), as a PNG file."""
    chosen, calibrated = [head["head"] for head in report["heads"]], report["calibrated"]
    marks = {
        "chosen, calibrated": ([head for head in chosen if head in calibrated], "X", "white"),
        "chosen, not changed": ([head for head in chosen if head not in calibrated], "X", "none"),
        "anchor": (sorted({anchor["head"] for head in report["heads"] for anchor in head["anchors"]}), "o", "none"),
    }
    outline = [withStroke(linewidth=3.0, foreground="black")]  # white on black is visible on every color
    style: dict[str, Any] = {"edgecolors": "white", "linewidths": 1.2, "s": 46, "path_effects": outline}
    n_layers, n_heads = np.shape(report["caf"])
    size = width, height = max(5.0, n_heads * _CELL), max(2.4, n_layers * _CELL)
    figure = new_figure(width + 2.0, 2 * height + 2.4)
    upper, lower = figure.subplots(2, 1)
    heat_map(figure, upper, report["caf"], size, "CAF")
    norm = CenteredNorm()  # equal colors mean equal distances from the mean of the layer
    heat_map(figure, lower, report["isal"], size, "I-SAL, standardized within each layer", cmap="RdBu_r", norm=norm)
    for label, (heads, marker, face) in marks.items():
        for axes in (upper, lower) if heads else ():
            layers, columns = np.array([Target.parse(head) for head in heads], dtype=int).T
            axes.scatter(columns, layers, marker=marker, facecolors=face, label=f"{label} ({len(heads)})", **style)
    if chosen:
        labeled = upper.get_legend_handles_labels()
        figure.legend(*labeled, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    provenance = report["provenance"]
    data = f"{provenance['samples']['profiled']} samples of {provenance['dataset']}"
    outcome = report["nothing_because"] or f"KL {report['kl']['total']:.4f}"
    figure.suptitle(f"{provenance['model']}, {data}\n{outcome}", fontsize=10)
    save_figure(figure, path)
