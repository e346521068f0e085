"""The loss plot: which curves on which axes."""

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes


def line(step: int, **values: float) -> dict[str, Any]:
    return {"current_steps": step, "total_steps": 30, **values}


def hera_line(step: int, shift: float = 0.0) -> dict[str, Any]:
    values = {"lm_loss": 3 - step / 10 + shift, "hera_loss": 2.0 + shift, "hera_mknn": step / 100 + shift}
    return line(step, loss=values["lm_loss"] + 0.01 * values["hera_loss"], **values, hera_mknn_chance=0.25)


def raw_curve(axes: Axes) -> dict[float, float]:
    """The curve that is not smoothed, which is drawn first; its steps grow."""
    steps, values = map(np.ndarray.tolist, axes.get_lines()[0].get_data())
    assert steps == sorted(set(steps))
    return dict(zip(steps, values, strict=True))


@pytest.fixture
def plot() -> Any:
    from llamafactory.extras.ploting import gen_loss_plot

    return gen_loss_plot


def test_both_losses_have_a_labeled_axis_and_mknn_its_own(plot: Any) -> None:
    log = [hera_line(step) for step in range(1, 21)]
    losses, alignment, hera = plot(log).axes
    assert [axes.get_ylabel() for axes in (losses, hera, alignment)] == ["LM loss", "HeRA loss", "MKNN"]
    for axes, key in ((losses, "lm_loss"), (hera, "hera_loss"), (alignment, "hera_mknn")):
        assert raw_curve(axes) == pytest.approx({entry["current_steps"]: entry[key] for entry in log})
    assert losses.get_position().bounds == hera.get_position().bounds
    assert hera.yaxis.get_label_position() == "right"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["LM loss", "HeRA loss"]


def test_chance_is_drawn_as_it_was_in_each_step(plot: Any) -> None:
    """It is higher where batches hold fewer images."""
    log = [hera_line(step) | {"hera_mknn_chance": 1 / step} for step in range(1, 9)]
    chance = plot(log).axes[1].get_lines()[-1]
    assert chance.get_label() == "chance"
    assert list(chance.get_ydata()) == [1 / step for step in range(1, 9)]


def test_steps_that_a_resumed_run_makes_again_replace_the_first(plot: Any) -> None:
    first = [hera_line(step) for step in range(1, 13)]
    again = [hera_line(step, shift=1.0) for step in range(11, 21)]
    for end_of_first in ([], [line(12, train_loss=1.0)]):
        log = [*first, *end_of_first, *again, line(20, train_loss=1.0)]
        curve = raw_curve(plot(log).axes[0])
        assert curve == pytest.approx({entry["current_steps"]: entry["lm_loss"] for entry in first[:10] + again})


def test_lines_without_the_curves_leave_gaps(plot: Any) -> None:
    log = [hera_line(1), line(2, loss=2.0), line(2, eval_loss=1.0), hera_line(3)]
    assert list(raw_curve(plot(log).axes[2])) == [1, 3]


def test_a_log_of_plain_training_is_plotted_by_the_host(plot: Any) -> None:
    (axes,) = plot([line(step, loss=1.0) for step in range(1, 5)]).axes
    assert axes.get_ylabel() == "loss"


@pytest.mark.parametrize("missing", [(), ("hera_mknn", "hera_mknn_chance")], ids=["no temperature", "no mknn"])
def test_an_objective_without_some_curve_is_drawn_without_it(plot: Any, missing: tuple[str, ...]) -> None:
    log = [{key: value for key, value in hera_line(step).items() if key not in missing} for step in range(1, 9)]
    figure = plot(log)
    drawn = [axes for axes in figure.axes if axes.get_ylabel() == "HeRA loss"]
    assert raw_curve(drawn[0]) == pytest.approx({entry["current_steps"]: entry["hera_loss"] for entry in log})
    assert len(figure.axes) == (2 if missing else 3)
