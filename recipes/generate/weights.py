"""Draws ``docs/weights.png``: the effect of ``hera_weight`` in the study, the demo and two real models."""

from pathlib import Path

import numpy as np

from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure, plain, save_figure

#: Gains of HeRA over plain fine-tuning, by experiment and weight: MKNN of the aligned heads, then correct answers
#: and their interval's ends, in points.
WORLDS = {
    "study, 1,500 steps": (BLUE, {0.01: (0.018, 0.15, -0.77, 1.06), 0.1: (0.180, 1.19, 0.07, 2.32)}),
    "demo, 320 steps": (ORANGE, {0.01: (0.105, 1.5, -0.8, 3.8), 0.03: (0.164, 0.0, -2.4, 2.5)}),
    "Gemma 3 270M, 150 steps": (
        GRAY,
        {0.01: (0.005, 0.3, -1.9, 2.5), 0.1: (0.044, 0.4, 0.0, 0.8), 1: (0.086, 1.5, 0.2, 2.8)},
    ),
    "SmolLM2-135M, 120 steps": (GREEN, {0.3: (0.021, -0.7, -3.6, 2.2), 1: (0.036, 0.1, -2.3, 2.4)}),
}


def draw(path: Path) -> None:
    """Draws the gains in MKNN and in correct answers (with 95% intervals) against the weight."""
    figure = new_figure(8.0, 3.0)
    left, right = figure.subplots(1, 2, sharex=True)
    for place, (name, (color, found)) in enumerate(WORLDS.items()):
        gains, answers, low, high = zip(*found.values(), strict=True)
        left.plot(list(found), gains, "o-", color=color, label=name)
        errors = [np.subtract(answers, low), np.subtract(high, answers)]
        apart = [weight * 1.08 ** (place - 1) for weight in found]  # draws intervals of equal weights side by side
        right.errorbar(apart, answers, yerr=errors, fmt="o", color=color, capsize=3)
    for axes, label in ((left, "gain in MKNN of the aligned heads"), (right, "gain in right answers (points)")):
        axes.set(xscale="log", xlabel="hera_weight", ylabel=label)
        axes.set_xticks((0.01, 0.03, 0.1, 0.3, 1), ("0.01", "0.03", "0.1", "0.3", "1"))
        axes.minorticks_off()
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        plain(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    draw(Path(__file__).parents[2] / "docs/weights.png")
