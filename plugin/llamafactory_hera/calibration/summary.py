"""A finished calibration in a few lines for the terminal."""

from typing import Any


def render_summary(report: dict[str, Any]) -> str:
    """What was calibrated, how far, from which anchors; with a control, what it changed.

    Args:
        report: Content of ``calibration.json``.
    """
    heads, kl = report["heads"], report["kl"]
    n_heads = heads["layers"] * heads["query"]
    control = report["provenance"]["control"]
    data = f"on {control} images" if control else "on the data as they are"
    n_targets, n_calibrated = len(report["targets"]), len(report["calibrated"])
    lines = [f"RAH-LoRA {data}: {n_calibrated} of {n_heads} heads calibrated; {n_targets} were targets"]
    if report["targets"]:
        lines.append(f"{'head':>7} {'I-SAL':>7} {'CAF':>9} {'alpha':>8} {'KL alone':>9}  state, anchors")
    for target in report["targets"]:
        anchors = " ".join(anchor["head"] for anchor in target["anchors"])
        alone = "" if target["kl"] is None else f"{target['kl']:.6f}"
        lines.append(
            f"{target['head']:>7} {target['isal_standardized']:7.2f} {target['caf']:9.4f} {target['alpha']:8.5f} "
            f"{alone:>9}  {target['state']}{', ' if anchors else ''}{anchors}"
        )
    if report["nothing_because"] is not None:
        lines.append(f"No adapter: {report['nothing_because']}.")
    else:
        lines.append(
            f"KL of all together {kl['total']:.6f}, {kl['total_before_roll_back']:.6f} before roll-back, at most "
            f"{kl['delta']:g}; {kl['roll_back_rate']:.1%} of the updates rolled back"
        )
    compared = report.get("compared_with_uncorrupted")
    if compared is not None:
        lines.append(
            f"control {control}: {len(compared['targets_in_both'])} targets are also targets "
            f"of the uncorrupted data, which has {len(compared['targets_normal'])}; rank correlation of I-SAL "
            f"{compared['isal_rank_correlation']:.3f}, of CAF {compared['caf_rank_correlation']:.3f}; KL "
            f"{compared['kl_control']:.6f}, on uncorrupted samples "
            f"{compared['kl_control_on_uncorrupted_samples']:.6f}, against {compared['kl_normal']:.6f} without control"
        )
    return "\n".join(lines)
