"""What a calibration found: the content of ``calibration.json``, lines for the terminal, ``calibration.png``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import CenteredNorm
from matplotlib.patheffects import withStroke
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ..files import read_json
from ..heads.targets import Target
from ..plots import heat_map, new_figure, save_figure
from .plan import Anchor, Plan
from .profile import Profile, standard_scores
from .settings import RahConfig
from .trust_region import Outcome, Trial
from .weights import HeadWeights, lora_factors

REPORT_FILE = "calibration.json"
_CELL = 0.2  # inches


def describe(
    profile: Profile, plan: Plan, outcome: Outcome, weights: HeadWeights, config: RahConfig, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``calibration.json``; ``facts`` say where all this comes from."""
    saliency, influence = profile.saliency, profile.influence(config.caf_lambda)
    gaps = standard_scores(influence) - saliency
    trials = {head: trial for trial in outcome.trials for head in trial.update.heads}
    changed = [head for update, _ in outcome.accepted for head in update.heads]
    calibrated = [str(head) for head in changed]
    tried = [trial for trial in outcome.trials if trial.tried]
    n_rolled_back = sum(trial.alpha == 0 for trial in tried)
    layout = weights.layout
    return {
        "calibrated": calibrated,
        "gap": sum(gaps[head].item() for head in changed) / len(changed) if changed else None,
        "nothing_because": _reason_for_nothing(plan, outcome, config),
        "heads": {
            "layers": layout.n_layers,
            "query": layout.n_heads,
            "calibrated_share": round(len(calibrated) / (layout.n_layers * layout.n_heads), 6),
        },
        "kl": {
            "delta": config.delta if config.update == "calibrate" else None,
            "total_before_roll_back": outcome.totals[0][1] if outcome.totals else 0.0,
            "total": outcome.kl,
            "measured": [{"updates": number, "kl": kl} for number, kl in outcome.totals],
            "roll_back_rate": round(n_rolled_back / len(tried), 6) if tried else 0.0,
        },
        "targets": [
            {"head": str(head), "isal_standardized": saliency[head].item(), "caf": influence[head].item()}
            | _describe_target(head, plan.anchors[head], trials.get(head))
            for head in plan.targets
        ],
        "adapter_rank": {name: len(a) for name, (a, _) in lora_factors(weights, outcome.accepted).items()},
        "settings": config.keys(),
        "provenance": dict(facts),
        "isal": _rows(profile.flow),
        "isal_standardized": _rows(saliency),
        "caf": _rows(influence),
    }


def _reason_for_nothing(plan: Plan, outcome: Outcome, config: RahConfig) -> str | None:
    if outcome.accepted:
        return None
    if config.delta == 0:
        return "rah_delta: 0 allows no change of the model"
    if not plan.targets:
        return "no head is a target: none has both a low I-SAL and a high CAF in the calibrated layers"
    if not plan.updates:
        return "no target has an anchor: no head within two layers has an I-SAL high enough (rah_beta)"
    return "no update stays: each was rolled back, or equals its anchors"


def _describe_target(head: Target, anchors: Sequence[Anchor], trial: Trial | None) -> dict[str, Any]:
    tried = trial.tried if trial else ()
    return {
        "anchors": [anchor._asdict() | {"head": str(anchor.head)} for anchor in anchors],
        "state": trial.state if trial else "not tried" if anchors else "no anchor",
        "changed_with": [str(other) for other in trial.update.heads if other != head] if trial else [],
        "changes": sorted({edit.kind for edit in trial.update.edits}) if trial and trial.alpha else [],
        "alpha": trial.alpha if trial else 0.0,
        "kl": tried[-1][1] if tried else None,
        "tried": [{"alpha": alpha, "kl": kl} for alpha, kl in tried],
    }


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


def compare(normal: dict[str, Any], corrupted: dict[str, Any]) -> dict[str, Any]:
    """What a control did to the targets, the scores and the divergence, from the reports with and without it."""
    ours, theirs = ([target["head"] for target in report["targets"]] for report in (normal, corrupted))
    both = [head for head in ours if head in theirs]
    return {
        "targets_normal": ours,
        "targets_in_both": both,
        "isal_rank_correlation": mean_rank_correlation(normal["isal"], corrupted["isal"]),
        "caf_rank_correlation": mean_rank_correlation(normal["caf"], corrupted["caf"]),
        "kl_normal": normal["kl"]["total"],
    }


def mean_rank_correlation(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Mean over layers of Spearman's correlation between heads; layers whose heads are all equal are left out."""
    ordered = [(a, b) for a, b in zip(ours, theirs, strict=True) if len(set(a)) > 1 and len(set(b)) > 1]
    return round(float(np.mean([spearmanr(a, b).statistic for a, b in ordered])), 6) if ordered else 0.0


def render_summary(report: dict[str, Any]) -> str:
    """A finished calibration in a few lines for the terminal, from the content of ``calibration.json``."""
    heads, kl, targets = report["heads"], report["kl"], report["targets"]
    control = report["provenance"]["control"]
    lines = [
        f"RAH-LoRA on {f'{control} images' if control else 'the data as they are'}: {len(report['calibrated'])} of "
        f"{heads['layers'] * heads['query']} heads {report['settings']['rah_update']}d; {len(targets)} were targets"
    ]
    if targets:
        lines.append(f"{'head':>7} {'I-SAL':>7} {'CAF':>9} {'alpha':>8} {'KL alone':>9}  state, anchors")
    for target in targets:
        alone = "" if target["kl"] is None else f"{target['kl']:.6f}"
        anchors = " ".join(anchor["head"] for anchor in target["anchors"])
        lines.append(
            f"{target['head']:>7} {target['isal_standardized']:7.2f} {target['caf']:9.4f} {target['alpha']:8.5f} "
            f"{alone:>9}  {target['state']}{anchors and f', {anchors}'}"
        )
    if report["nothing_because"] is not None:
        lines.append(f"No adapter: {report['nothing_because']}.")
    elif kl["delta"] is None:
        lines.append(f"KL of all together {kl['total']:.6f}, without a bound")
    else:
        lines.append(
            f"KL of all together {kl['total']:.6f}, {kl['total_before_roll_back']:.6f} before roll-back, at most "
            f"{kl['delta']:g}; {kl['roll_back_rate']:.1%} of the updates rolled back"
        )
    if report["gap"] is not None:
        lines.append(f"influence-saliency gap of these heads {report['gap']:.3f}")
    compared = report.get("compared_with_uncorrupted")
    if compared is not None:
        lines.append(
            f"control {control}: {len(compared['targets_in_both'])} targets are also targets "
            f"of the uncorrupted data, which has {len(compared['targets_normal'])}; rank correlation of I-SAL "
            f"{compared['isal_rank_correlation']:.3f}, of CAF {compared['caf_rank_correlation']:.3f}; KL "
            f"{kl['total']:.6f}, on uncorrupted samples "
            f"{compared['kl_control_on_uncorrupted_samples']:.6f}, against {compared['kl_normal']:.6f} without control"
        )
    return "\n".join(lines)


def draw_calibration(report: dict[str, Any], target: Path) -> None:
    """Draws CAF and I-SAL of every head one above the other, targets and anchors marked (fig. 3), into a PNG."""
    targets = [target["head"] for target in report["targets"]]
    anchors = sorted({anchor["head"] for target in report["targets"] for anchor in target["anchors"]})
    marks = (
        ([head for head in targets if head in report["calibrated"]], "X", "white", "target, calibrated"),
        ([head for head in targets if head not in report["calibrated"]], "X", "none", "target, not changed"),
        (anchors, "o", "none", "anchor"),
    )
    # a white line within a black one shows on every color of the scale
    outline = [withStroke(linewidth=3.0, foreground="black")]
    style: dict[str, Any] = {"edgecolors": "white", "linewidths": 1.2, "s": 46, "path_effects": outline}
    n_layers, n_heads = np.shape(report["caf"])
    width, height = max(5.0, n_heads * _CELL), max(2.4, n_layers * _CELL)
    figure = new_figure(width + 2.0, 2 * height + 2.4)
    upper, lower = figure.subplots(2, 1)
    heat_map(figure, upper, report["caf"], (width, height), "CAF")
    # equal colors mean equal distance from the layer's mean
    colors: dict[str, Any] = {"cmap": "RdBu_r", "norm": CenteredNorm()}
    title = "I-SAL, standardized in each layer"
    heat_map(figure, lower, report["isal_standardized"], (width, height), title, **colors)
    for axes in (upper, lower):
        for heads, marker, face, label in marks:
            if heads:
                layers, columns = np.array([Target.parse(head) for head in heads], dtype=int).T
                style |= {"marker": marker, "facecolors": face, "label": f"{label} ({len(heads)})"}
                axes.scatter(columns, layers, **style)
    handles, _ = upper.get_legend_handles_labels()
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    facts = report["provenance"]
    data = f"{facts['control']} images of {facts['dataset']}" if facts["control"] else facts["dataset"]
    total, delta = report["kl"]["total"], report["kl"]["delta"]
    outcome = report["nothing_because"] or f"KL {total:.4f}{f' of at most {delta:g}' if delta is not None else ''}"
    figure.suptitle(f"{facts['model']}, {facts['samples']['profiled']} samples of {data}\n{outcome}", fontsize=10)
    save_figure(figure, target)


def correlate_gains(measured: Sequence[str], target: Path) -> str:
    """Draws the influence-saliency gap of calibrations against what they gained, and says how both correlate.

    The paper states r > 0.8 (section 1) and neither defines the gap nor says over which points: here a point is a
    calibration, and its gap the mean over its changed heads of CAF less I-SAL, both as standard scores of the layer.

    Args:
        measured: ``FOLDER=GAIN``: a calibration's output, and what it changed on a benchmark, in points.
        target: A PNG to write.

    Raises:
        ValueError: A folder without a gap, a gain that is no number, or too few different points.
    """
    points = []
    for point in measured:
        folder, _, gain = point.rpartition("=")
        try:
            points.append((folder, float(read_json(Path(folder) / REPORT_FILE)["gap"]), float(gain)))
        except (ValueError, KeyError, TypeError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"gap: {point} is not FOLDER=GAIN with the output folder of a calibration that changed heads and a "
                f"number{why}; for instance saves/calibrate=1.4."
            ) from error
    gaps, gains = [gap for _, gap, _ in points], [gain for *_, gain in points]
    if len(set(gaps)) < 3 or len(set(gains)) < 2:
        raise ValueError("gap: a correlation needs three calibrations or more, with different gaps and gains.")
    r, p = pearsonr(gaps, gains)
    figure = new_figure(5.0, 4.0)
    axes = figure.subplots()
    axes.scatter(gaps, gains)
    axes.axline((float(np.mean(gaps)), float(np.mean(gains))), slope=np.polyfit(gaps, gains, 1)[0], color="0.6")
    for name, x, y in points:
        axes.annotate(Path(name).name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="influence-saliency gap", ylabel="gain, points", title=f"r = {r:.2f}")
    save_figure(figure, target)
    rows = [f"{x:8.3f} {y:+8.2f}  {name}" for name, x, y in points]
    return "\n".join([f"{'gap':>8} {'gain':>8}", *rows, f"r = {r:.3f} over {len(gaps)} calibrations, p = {p:.3g}"])
