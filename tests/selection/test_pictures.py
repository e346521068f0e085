"""The picture of all heads or layers; labels must not touch, at the largest size as at the smallest."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from llamafactory_hera.plots import tick_step
from llamafactory_hera.selection import pictures
from llamafactory_hera.selection.pictures import show
from llamafactory_hera.selection.scores import ScoreFile

from .tiny import write_scores


def scored(path, n_layers, n_heads, **provenance):
    values = np.random.default_rng(0).uniform(0.05, 0.5, (n_layers, n_heads))
    values[0, 1] = math.nan
    return ScoreFile.load(write_scores(path / "heads.json", values.tolist(), **provenance))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(n_layers, n_heads, layers) -> the figure."""

    def draw(n_layers, n_heads, layers=None):
        figures = []
        monkeypatch.setattr(pictures, "save_figure", lambda figure, target: figures.append(figure))
        pictures.draw_scores(scored(tmp_path, n_layers, n_heads, layers=layers), tmp_path / "x.png")
        figures[0].canvas.draw()
        return figures[0]

    return draw


def boxes(labels, renderer):
    shown = [label for label in labels if label.get_text() and label.get_visible()]
    return [(label.get_text(), label.get_window_extent(renderer)) for label in shown]


def ticks(axis):
    """Labels of an axis that are drawn; there are others, beyond its ends."""
    low, high = sorted(axis.get_view_interval())
    drawn = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for tick in drawn for label in (tick.label1, tick.label2)]


@pytest.mark.parametrize("layers", [None, ["L1", "L0"]], ids=["heads", "layers"])
@pytest.mark.parametrize(("n_layers", "n_heads"), [(2, 4), (24, 16), (36, 32), (48, 64), (80, 128)])
def test_no_labels_overlap_and_none_is_cut_off(drawn, n_layers, n_heads, layers):
    figure = drawn(n_layers, n_heads, layers)
    renderer = figure.canvas.get_renderer()
    texts = boxes([figure._suptitle], renderer)
    for axes in figure.axes:
        texts += boxes([*ticks(axes.xaxis), *ticks(axes.yaxis)], renderer)
        texts += boxes([axes.title, axes.xaxis.label, axes.yaxis.label], renderer)
        if axes.get_legend() is not None:
            texts += boxes(axes.get_legend().get_texts(), renderer)
    for (name, box), (other_name, other) in itertools.combinations(texts, 2):
        assert not box.overlaps(other), f"{name!r} and {other_name!r}"
    for name, box in texts:
        assert figure.bbox.x0 <= box.x0, name
        assert box.x1 <= figure.bbox.x1, name
        assert figure.bbox.y0 <= box.y0, name
        assert box.y1 <= figure.bbox.y1, name


def test_the_selected_heads_are_framed_and_broken_ones_crossed(drawn):
    axes = drawn(6, 8).axes[0]
    chosen = axes.get_title().split()[-2:]
    frames = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in axes.patches}
    assert {f"L{int(y)}H{int(x)}" for x, y in frames} == set(chosen)
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("×", (1, 0))]


def test_the_curves_are_best_layer_and_worst(drawn, tmp_path):
    axes = drawn(6, 8).axes[1]
    file = ScoreFile.load(tmp_path / "heads.json")
    curves = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(curves["best head of the layer"], np.nanmax(file.scores, axis=1))
    np.testing.assert_allclose(curves["worst head of the layer"], np.nanmin(file.scores, axis=1))
    np.testing.assert_allclose(curves["layer output"], 0.2)
    np.testing.assert_allclose(curves["chance"], file.chance)


def test_selected_layers_are_ringed_in_the_curve_of_layers(drawn):
    (axes,) = drawn(6, 8, ["L4", "L1"]).axes
    assert "layer output" in [line.get_label() for line in axes.lines]
    (rings,) = [found for found in axes.collections if found.get_label() == "selected (worst) L4 L1"]
    np.testing.assert_allclose(rings.get_offsets(), [(4, 0.2), (1, 0.2)])


def test_a_layer_without_any_score_is_drawn(tmp_path):
    path = write_scores(tmp_path / "heads.json", [[0.2, 0.3], [math.nan, math.nan]])
    show(path)
    assert Image.open(tmp_path / "heads.png").size[0] > 500


@pytest.mark.parametrize(("count", "room", "step"), [(8, 4.0, 1), (64, 10.0, 2), (128, 8.0, 4), (400, 4.0, 20)])
def test_labels_are_thinned_until_they_fit(count, room, step):
    assert tick_step(count, room, 0.2) == step
