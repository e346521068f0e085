"""What a calibration found, as plain values: the content of ``calibration.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..heads.targets import Target
from .adapter import adapter_ranks
from .plan import Plan
from .profile import Profile
from .settings import PREFIX, RahSettings
from .trials import Outcome, Trial
from .weights import HeadWeights


@dataclass(frozen=True)
class Result:
    """All that one calibration found.

    Attributes:
        profile: Of the model.
        plan: Targets, anchors, updates.
        outcome: What became of the updates; None where none was tried.
        reason: Why there is no adapter; None where there is one.
    """

    profile: Profile
    plan: Plan
    outcome: Outcome | None
    reason: str | None


def reason_for_nothing(plan: Plan, outcome: Outcome | None, settings: RahSettings) -> str | None:
    """Why a calibration changes nothing, in a sentence; None if it does change something."""
    if settings.delta == 0:
        return "rah_delta: 0 allows no change of the model"
    if not plan.targets:
        return "no head is a target: none has both a low I-SAL and a high CAF in the calibrated layers"
    if not plan.updates:
        return "no target has an anchor: no head within two layers has an I-SAL high enough (rah_beta)"
    if outcome is not None and not outcome.accepted:
        return "no update stays: each was rolled back, or equals its anchors"
    return None


def describe(result: Result, weights: HeadWeights, settings: RahSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``calibration.json``.

    Args:
        result: What was found.
        weights: For the layout.
        settings: Of the calibration.
        facts: Where all this comes from.
    """
    profile, plan, outcome = result.profile, result.plan, result.outcome
    saliency, influence = profile.saliency, profile.influence(settings.caf_lambda)
    trials = {head: trial for trial in (outcome.trials if outcome else []) for head in trial.update.heads}
    layout = weights.layout
    calibrated = [str(head) for update, _ in (outcome.accepted if outcome else []) for head in update.heads]
    return {
        "calibrated": calibrated,
        "nothing_because": result.reason,
        "heads": {
            "layers": layout.n_layers,
            "query": layout.n_heads,
            "key_value": layout.n_kv_heads,
            "head_dim": layout.head_dim,
            "calibrated_share": round(len(calibrated) / (layout.n_layers * layout.n_heads), 6),
        },
        "kl": _describe_kl(outcome, settings),
        "targets": [
            _describe_target(head, result, trials.get(head), saliency[head].item(), influence[head].item())
            for head in plan.targets
        ],
        "adapter_rank": adapter_ranks(weights, outcome.accepted) if outcome else {},
        "settings": {f"{PREFIX}{name}": value for name, value in asdict(settings).items()},
        "provenance": dict(facts),
        "isal": _rows(profile.flow),
        "isal_standardized": _rows(saliency),
        "caf": _rows(influence),
    }


def _describe_kl(outcome: Outcome | None, settings: RahSettings) -> dict[str, Any]:
    totals = outcome.totals if outcome else []
    tried = [trial for trial in outcome.trials if trial.tried] if outcome else []
    rolled_back = [trial for trial in tried if trial.state != "calibrated"]
    return {
        "delta": settings.delta,
        "total_before_roll_back": totals[0].kl if totals else 0.0,
        "total": outcome.kl if outcome else 0.0,
        "measured": [{"updates": int(step.alpha), "kl": step.kl} for step in totals],
        "rolled_back": [str(head) for trial in rolled_back for head in trial.update.heads],
        "roll_back_rate": round(len(rolled_back) / len(tried), 6) if tried else 0.0,
    }


def _describe_target(head: Target, result: Result, trial: Trial | None, isal: float, caf: float) -> dict[str, Any]:
    anchors = result.plan.anchors[head]
    if trial is not None:
        state: str = trial.state
    else:
        state = "not tried" if anchors else "no anchor"
    return {
        "head": str(head),
        "isal_standardized": isal,
        "caf": caf,
        "anchors": [anchor._asdict() | {"head": str(anchor.head)} for anchor in anchors],
        "state": state,
        "changed_with": [str(other) for other in trial.update.heads if other != head] if trial else [],
        "changes": sorted({edit.part for edit in trial.update.edits}) if trial and trial.alpha else [],
        "alpha": trial.alpha if trial else 0.0,
        "kl_at_alpha_max": trial.tried[0].kl if trial and trial.tried else None,
        "kl": trial.tried[-1].kl if trial and trial.tried else None,
        "tried": [step._asdict() for step in trial.tried] if trial else [],
    }


def _rows(values: Tensor) -> list[list[float]]:
    return [[float(f"{value:.8g}") for value in row] for row in values.tolist()]


def compare(normal: dict[str, Any], corrupted: dict[str, Any]) -> dict[str, Any]:
    """What a control did to the targets, the scores and the divergence.

    Args:
        normal: Report of the calibration on the data as they are.
        corrupted: Report of the one on corrupted data.
    """
    ours, theirs = ([target["head"] for target in report["targets"]] for report in (normal, corrupted))
    both = [head for head in ours if head in theirs]
    union = len(set(ours) | set(theirs))
    return {
        "targets_normal": ours,
        "targets_control": theirs,
        "targets_in_both": both,
        "targets_jaccard": round(len(both) / union, 6) if union else None,
        "isal_rank_correlation": _mean_rank_correlation(normal["isal"], corrupted["isal"]),
        "caf_rank_correlation": _mean_rank_correlation(normal["caf"], corrupted["caf"]),
        "calibrated_normal": normal["calibrated"],
        "calibrated_control": corrupted["calibrated"],
        "kl_normal": normal["kl"]["total"],
        "kl_control": corrupted["kl"]["total"],
    }


def _mean_rank_correlation(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Mean over layers of Spearman's correlation between heads: targets are chosen by their rank in a layer."""

    def ranks(rows: Sequence[Sequence[float]]) -> np.ndarray:
        return np.argsort(np.argsort(np.array(rows), axis=1, kind="stable"), axis=1, kind="stable")

    a, b = ranks(ours).astype(float), ranks(theirs).astype(float)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return round(float(((a * b).sum(axis=1) / (a * a).sum(axis=1)).mean()), 6)
