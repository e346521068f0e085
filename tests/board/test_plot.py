"""The loss plot: the curves and their axes."""

from typing import Any

import numpy as np
import pytest
from llamafactory.extras.ploting import gen_loss_plot
from matplotlib.axes import Axes


def line(step: int, **values: float) -> dict[str, Any]:
    return {"current_steps": step, "total_steps": 30, **values}


def hera_line(step: int, shift: float = 0.0) -> dict[str, Any]:
    values = {"lm_loss": 3 - step / 10 + shift, "hera_loss": 2.0 + shift, "hera_mknn": step / 100 + shift}
    return line(step, loss=values["lm_loss"] + 0.01 * values["hera_loss"], **values, hera_mknn_chance=1 / step)


def raw_curve(axes: Axes) -> dict[float, float]:
    """Returns the curve before smoothing, which is drawn first; its steps must grow."""
    steps, values = map(np.ndarray.tolist, axes.get_lines()[0].get_data())
    assert steps == sorted(set(steps))
    return dict(zip(steps, values, strict=True))


def test_both_losses_and_mknn_have_labeled_axes_and_chance_varies():
    log = [hera_line(step) for step in range(1, 21)]
    losses, alignment, hera = gen_loss_plot(log).axes
    for axes, key, label in (
        (losses, "lm_loss", "LM loss"),
        (hera, "hera_loss", "HeRA loss"),
        (alignment, "hera_mknn", "MKNN"),
    ):
        assert axes.get_ylabel() == label
        assert raw_curve(axes) == pytest.approx({entry["current_steps"]: entry[key] for entry in log})
    assert hera.yaxis.get_label_position() == "right"
    assert list(alignment.get_lines()[-1].get_ydata()) == [1 / step for step in range(1, 21)]


def test_steps_that_a_resumed_run_repeats_replace_the_first():
    first = [hera_line(step) for step in range(1, 13)]
    again = [hera_line(step, shift=1.0) for step in range(11, 21)]
    for end_of_first in ([], [line(12, train_loss=1.0)]):
        log = [*first, *end_of_first, *again, line(20, train_loss=1.0)]
        curve = raw_curve(gen_loss_plot(log).axes[0])
        assert curve == pytest.approx({entry["current_steps"]: entry["lm_loss"] for entry in first[:10] + again})


def test_lines_and_logs_without_some_curves_are_plotted():
    filling = line(1, loss=2.0, lm_loss=2.0)  # the memory is not full
    log = [filling, hera_line(2), line(3, loss=2.0), line(3, eval_loss=1.0), hera_line(4)]
    for entries, steps in ((log, [2, 4]), (log[:1], [])):
        figure = gen_loss_plot(entries)
        assert list(raw_curve(figure.axes[0])) == [1, *steps]
        assert figure.axes[0].get_ylabel() == "LM loss"
        assert all(list(raw_curve(axes)) == steps for axes in figure.axes[1:])
    no_mknn = [{key: value for key, value in entry.items() if "mknn" not in key} for entry in log]
    assert [axes.get_ylabel() for axes in gen_loss_plot(no_mknn).axes] == ["LM loss", "HeRA loss"]
    (axes,) = gen_loss_plot([line(step, loss=1.0) for step in range(1, 5)]).axes
    assert axes.get_ylabel() == "loss"  # the host's own plot
