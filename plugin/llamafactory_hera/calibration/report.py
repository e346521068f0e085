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
from .plan import Plan
from .profile import Profile
from .settings import RahConfig
from .trust_region import Outcome, Trial

REPORT_FILE = "calibration.json"
_CELL = 0.2  # inches


def describe(
    profile: Profile, plan: Plan, outcome: Outcome, config: RahConfig, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of ``calibration.json``; ``provenance`` names the model, the data and the samples."""
    saliency, influence = profile.saliency, profile.influence(config.caf_lambda)
    trials = {head: trial for trial in outcome.trials for head in trial.update.heads}
    tried = [trial for trial in outcome.trials if trial.tried]
    rolled_back = sum(trial.alpha == 0 for trial in tried)
    return {
        "calibrated": [str(head) for update, _ in outcome.accepted for head in update.heads],
        "nothing_because": _reason_for_nothing(plan, outcome, config),
        "kl": {
            "total": outcome.kl,
            "total_before_roll_back": outcome.kl_before,
            "delta": config.delta if config.update == "calibrate" else None,
            "roll_back_rate": round(rolled_back / len(tried), 6) if tried else 0.0,
        },
        "heads": [
            {"head": str(head), "isal": saliency[head].item(), "caf": influence[head].item()}
            | {"anchors": [anchor._asdict() | {"head": str(anchor.head)} for anchor in plan.anchors[head]]}
            | _fate(trials.get(head), bool(plan.anchors[head]))
            for head in plan.heads
        ],
        "settings": config.keys(),
        "provenance": dict(provenance),
        "isal": _rows(saliency),
        "caf": _rows(influence),
    }


def _reason_for_nothing(plan: Plan, outcome: Outcome, config: RahConfig) -> str | None:
    if outcome.accepted:
        return None
    if config.delta == 0:
        return "rah_delta: 0 allows no change of the model"
    if not plan.heads:
        return "no head was chosen, because none in the calibrated layers has low I-SAL and high CAF"
    if not plan.updates:
        return "no chosen head has an anchor, because no head within two layers has enough I-SAL (rah_beta)"
    return "no update remains, because each one was rolled back or equals its anchors"


def _fate(trial: Trial | None, has_anchor: bool) -> dict[str, Any]:
    if trial is None:
        return {"state": "not tried" if has_anchor else "no anchor", "alpha": 0.0, "kl": None, "tried": []}
    tried = [{"alpha": alpha, "kl": kl} for alpha, kl in trial.tried]
    return {"state": trial.state, "alpha": trial.alpha, "kl": tried[-1]["kl"] if tried else None, "tried": tried}


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


def render_summary(report: dict[str, Any]) -> str:
    """Renders the content of ``calibration.json`` in a few lines."""
    heads, kl = report["heads"], report["kl"]
    lines = [
        f"RAH-LoRA: {len(heads)} of {np.size(report['caf'])} heads chosen, {len(report['calibrated'])} "
        f"{report['settings']['rah_update']}d"
    ]
    if heads:
        lines.append(f"{'head':>7} {'I-SAL':>7} {'CAF':>9} {'alpha':>8} {'KL alone':>9}  state, anchors")
    for head in heads:
        alone = "" if head["kl"] is None else f"{head['kl']:.6f}"
        scores = f"{head['isal']:7.2f} {head['caf']:9.4f} {head['alpha']:8.5f} {alone:>9}"
        anchors = "".join(f" {anchor['head']}" for anchor in head["anchors"])
        lines.append(f"{head['head']:>7} {scores}  {head['state']}{anchors and ','}{anchors}")
    if report["nothing_because"] is not None:
        lines.append(f"No adapter: {report['nothing_because']}.")
    elif kl["delta"] is None:
        lines.append(f"KL divergence of all updates together: {kl['total']:.6f}, without a bound")
    else:
        lines.append(
            f"KL divergence of all updates together: {kl['total']:.6f} (bound {kl['delta']:g}, "
            f"{kl['total_before_roll_back']:.6f} before roll-back); {kl['roll_back_rate']:.1%} of the updates were "
            "rolled back"
        )
    return "\n".join(lines)


def draw_calibration(report: dict[str, Any], path: Path) -> None:
    """Draws CAF and I-SAL of every head, with the chosen heads and anchors marked (paper, fig. 3), as a PNG file."""
    chosen = [head["head"] for head in report["heads"]]
    anchors = sorted({anchor["head"] for head in report["heads"] for anchor in head["anchors"]})
    marks = (
        ([head for head in chosen if head in report["calibrated"]], "X", "white", "chosen, calibrated"),
        ([head for head in chosen if head not in report["calibrated"]], "X", "none", "chosen, not changed"),
        (anchors, "o", "none", "anchor"),
    )
    # a white line on a black one is visible on every color of the scale
    outline = [withStroke(linewidth=3.0, foreground="black")]
    style: dict[str, Any] = {"edgecolors": "white", "linewidths": 1.2, "s": 46, "path_effects": outline}
    n_layers, n_heads = np.shape(report["caf"])
    width, height = max(5.0, n_heads * _CELL), max(2.4, n_layers * _CELL)
    figure = new_figure(width + 2.0, 2 * height + 2.4)
    upper, lower = figure.subplots(2, 1)
    heat_map(figure, upper, report["caf"], (width, height), "CAF")
    # centered, so that equal colors mean equal distances from the mean of the layer
    colors: dict[str, Any] = {"cmap": "RdBu_r", "norm": CenteredNorm()}
    heat_map(figure, lower, report["isal"], (width, height), "I-SAL, standardized within each layer", **colors)
    for axes in (upper, lower):
        for heads, marker, face, label in marks:
            if heads:
                layers, columns = np.array([Target.parse(head) for head in heads], dtype=int).T
                style |= {"marker": marker, "facecolors": face, "label": f"{label} ({len(heads)})"}
                axes.scatter(columns, layers, **style)
    handles, _ = upper.get_legend_handles_labels()
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    provenance, total, delta = report["provenance"], report["kl"]["total"], report["kl"]["delta"]
    outcome = report["nothing_because"] or f"KL {total:.4f}{f' (bound {delta:g})' if delta is not None else ''}"
    data = f"{provenance['samples']['profiled']} samples of {provenance['dataset']}"
    figure.suptitle(f"{provenance['model']}, {data}\n{outcome}", fontsize=10)
    save_figure(figure, path)
