"""The plot of a calibration."""

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

from llamafactory_hera.calibration import report as reporting
from llamafactory_hera.calibration.report import draw_calibration

HEADS = [
    {"head": "L0H31", "anchors": [{"head": "L0H2"}, {"head": "L1H7"}]},
    {"head": "L2H5", "anchors": [{"head": "L0H2"}]},
]


def test_maps_show_the_scores_and_every_mark_is_on_its_head(tmp_path, monkeypatch):
    noise = np.random.default_rng(0)
    content = {
        "caf": noise.normal(size=(3, 40)).tolist(),
        "isal": noise.normal(size=(3, 40)).tolist(),
        "heads": HEADS,
        "calibrated": ["L0H31"],
        "nothing_because": None,
        "kl": {"total": 0.01, "delta": 0.05},
        "provenance": {"model": "m", "dataset": "d", "samples": {"profiled": 68}},
    }
    figures: list[Figure] = []
    save = reporting.save_figure
    monkeypatch.setattr(reporting, "save_figure", lambda made, path: (figures.append(made), save(made, path)))
    draw_calibration(content, tmp_path / "calibration.png")
    assert matplotlib.image.imread(tmp_path / "calibration.png")[..., :3].std() > 0.05
    (made,) = figures
    for axes, name in zip(made.axes, ("caf", "isal"), strict=False):
        assert np.array_equal(axes.images[0].get_array(), content[name])
        marks = [{tuple(place) for place in group.get_offsets()} for group in axes.collections]
        assert marks == [{(31, 0)}, {(5, 2)}, {(2, 0), (7, 1)}]  # x is the head, y the layer
    labels = [text.get_text() for text in made.legends[0].get_texts()]
    assert labels == ["chosen, calibrated (1)", "chosen, not changed (1)", "anchor (2)"]
    low, high = made.axes[1].images[0].get_clim()
    assert low == -high
