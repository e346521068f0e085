"""The picture, each mark on its head, and the comparison with a control."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from llamafactory_hera.calibration import report as reporting
from llamafactory_hera.calibration.report import draw_calibration, mean_rank_correlation
from llamafactory_hera.cli import main
from llamafactory_hera.files import write_json

LAYERS, HEADS = 3, 40


def report(targets: list[dict[str, Any]], calibrated: list[str]) -> dict[str, Any]:
    noise = np.random.default_rng(0)
    return {
        "caf": noise.normal(size=(LAYERS, HEADS)).tolist(),
        "isal_standardized": noise.normal(size=(LAYERS, HEADS)).tolist(),
        "targets": targets,
        "calibrated": calibrated,
        "nothing_because": None if calibrated else "no head is a target",
        "kl": {"total": 0.01, "delta": 0.05},
        "provenance": {"model": "m", "dataset": "d", "control": None, "samples": {"profiled": 68}},
    }


TARGETS = [
    {"head": "L0H31", "anchors": [{"head": "L0H2"}, {"head": "L1H7"}]},
    {"head": "L2H5", "anchors": [{"head": "L0H2"}]},
]


def drawn(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Figure:
    figures: list[Figure] = []
    monkeypatch.setattr(reporting, "save_figure", lambda made, _: figures.append(made))
    draw_calibration(content, Path("unused.png"))
    return figures[0]


def test_maps_show_the_scores_and_marks_stand_on_their_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    content = report(TARGETS, ["L0H31"])
    made = drawn(content, monkeypatch)
    for axes, name in zip(made.axes, ("caf", "isal_standardized"), strict=False):
        assert np.array_equal(axes.images[0].get_array(), content[name])
        marks = [{tuple(place) for place in group.get_offsets()} for group in axes.collections]
        assert marks == [{(31, 0)}, {(5, 2)}, {(2, 0), (7, 1)}]  # x is the head, y the layer
    labels = [text.get_text() for text in made.legends[0].get_texts()]
    assert labels == ["target, calibrated (1)", "target, not changed (1)", "anchor (2)"]
    low, high = made.axes[1].images[0].get_clim()
    assert low == -high  # equal colors mean equal distance from the mean


def test_a_calibration_of_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(report([], []), monkeypatch)
    assert not made.legends
    assert "no head is a target" in made.get_suptitle()


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw_calibration(report(TARGETS, []), tmp_path / "calibration.png")
    assert matplotlib.image.imread(tmp_path / "calibration.png")[..., :3].std() > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.png"]


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([[1, 2, 3, 4]], [[10, 20, 30, 40]], 1.0),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], [[4, 3, 2, 1], [1, 2, 3, 4]], 0.0),  # the mean over layers
        ([[1, 1, 2, 2]], [[1, 2, 1, 2]], 0.0),  # heads that are equal share a rank
        ([[1, 1, 2, 3]], [[3, 1, 2, 1]], -1.75 / 4.5),
        ([[5, 5, 5], [1, 2, 3]], [[1, 2, 3], [2, 4, 9]], 1.0),  # a layer of equal heads has no order
        ([[5, 5, 5]], [[1, 2, 3]], 0.0),
    ],
)
def test_rank_correlation_of_heads(ours: list[list[float]], theirs: list[list[float]], expected: float) -> None:
    assert mean_rank_correlation(ours, theirs) == pytest.approx(expected, abs=1e-6)


def test_gaps_are_correlated_with_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gaps, gains = [1.0, 2.0, 4.0, 3.0], [0.5, 1.0, 1.5, 1.75]
    for number, gap in enumerate([*gaps, None]):
        write_json(tmp_path / f"run{number}/calibration.json", {"gap": gap})
    points = [f"{tmp_path}/run{number}={gain}" for number, gain in enumerate(gains)]
    assert main(["gap", *points, "--output", str(tmp_path / "gap.png")]) == 0
    assert f"r = {np.corrcoef(gaps, gains)[0, 1]:.3f} over 4 calibrations" in capsys.readouterr().out
    assert matplotlib.image.imread(tmp_path / "gap.png")[..., :3].std() > 0.05
    assert main(["gap", *points, "--output", str(tmp_path / "missing/gap.png")]) == 2
    assert "--output: " in capsys.readouterr().err
    for bad, said in (
        ([*points, f"{tmp_path}/run4=1"], "run4=1 is not FOLDER=GAIN"),  # changed no head
        ([*points, f"{tmp_path}/nothing=1"], "nothing/calibration.json cannot be read"),
        ([*points, f"{tmp_path}/run0"], "run0 is not FOLDER=GAIN"),
        (points[:2], "needs three calibrations"),
    ):
        assert main(["gap", *bad, "--output", str(tmp_path / "none.png")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "none.png").exists()
