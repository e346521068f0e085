"""The picture of a calibration."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from llamafactory_hera.calibration import report as reporting
from llamafactory_hera.calibration.report import draw_calibration

HEADS = [
    {"head": "L0H31", "anchors": [{"head": "L0H2"}, {"head": "L1H7"}]},
    {"head": "L2H5", "anchors": [{"head": "L0H2"}]},
]


def report(calibrated: list[str]) -> dict[str, Any]:
    noise = np.random.default_rng(0)
    return {
        "caf": noise.normal(size=(3, 40)).tolist(),
        "isal": noise.normal(size=(3, 40)).tolist(),
        "heads": HEADS,
        "calibrated": calibrated,
        "nothing_because": None if calibrated else "no update remains",
        "kl": {"total": 0.01, "delta": 0.05},
        "provenance": {"model": "m", "dataset": "d", "samples": {"profiled": 68}},
    }


def test_maps_show_the_scores_and_every_mark_is_on_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(reporting, "save_figure", lambda made, _: figures.append(made))
    content = report(["L0H31"])
    draw_calibration(content, Path("unused.png"))
    (made,) = figures
    for axes, name in zip(made.axes, ("caf", "isal"), strict=False):
        assert np.array_equal(axes.images[0].get_array(), content[name])
        marks = [{tuple(place) for place in group.get_offsets()} for group in axes.collections]
        assert marks == [{(31, 0)}, {(5, 2)}, {(2, 0), (7, 1)}]  # x is the head, y the layer
    labels = [text.get_text() for text in made.legends[0].get_texts()]
    assert labels == ["chosen, calibrated (1)", "chosen, not changed (1)", "anchor (2)"]
    low, high = made.axes[1].images[0].get_clim()
    assert low == -high


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw_calibration(report([]), tmp_path / "calibration.png")
    assert matplotlib.image.imread(tmp_path / "calibration.png")[..., :3].std() > 0.05
