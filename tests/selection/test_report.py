"""Reports: numbers match the files in every format, foreign text is escaped, and plots are legible."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamafactory_hera.cli import main
from llamafactory_hera.heads import Targets
from llamafactory_hera.plots import BLUE, GRAY, ORANGE, series_colors
from llamafactory_hera.selection.gallery import Neighbors, write_gallery
from llamafactory_hera.selection.page import verdict, write_report
from llamafactory_hera.selection.report import compare, draw_scores, show
from llamafactory_hera.selection.scores import ScoreFile
from tests.tiny_models import edit_json

from .test_gallery import write_seen
from .tiny import KEYS, write_scores

NAN = math.nan
BEFORE = [[0.10, 0.50, 0.30, 0.20], [0.15, 0.60, 0.25, 0.40], [0.05, 0.35, 0.45, 0.55]]
AFTER = [[0.30, 0.51, 0.31, 0.40], [0.35, 0.59, 0.45, 0.41], [0.25, 0.36, 0.44, 0.56]]
ALIGNED = ["L0H1", "L2H0"]


@pytest.fixture
def files(tmp_path):
    names = {"base/hera/heads.json": BEFORE, "run/hera/scores.json": AFTER}
    return [write_scores(tmp_path / name, scores) for name, scores in names.items()]


@pytest.fixture
def run(tmp_path):
    """The folder of a run with its selection, its scores, and the neighbors of its heads."""
    folder = tmp_path / "my_run"
    for seed, (name, scores) in enumerate({"heads": BEFORE, "scores": AFTER}.items(), 1):
        path = write_scores(folder / f"hera/{name}.json", scores)
        write_seen(path, tmp_path / "images", seed, heads=4)
    edit_json(folder / "hera/heads.json", heads=ALIGNED)
    return folder


def test_the_least_aligned_heads_of_the_first_file_are_compared_with_all_others(files):
    comparison = compare(files)
    assert comparison.title == compare(files[::-1]).title == "least aligned"
    assert " ".join(comparison.rows) == "L2H0 L0H0 L1H0 L0H3 L1H2 mean others"
    assert comparison.table[:2] == [["head", "base", "run", "run − base"], ["L2H0", "0.0500", "0.2500", "+0.2000"]]
    assert comparison.table[6] == ["mean", "0.1500", "0.3500", "+0.2000"]
    others = [[0.50, 0.30, 0.60, 0.40, 0.35, 0.45, 0.55], [0.51, 0.31, 0.59, 0.41, 0.36, 0.44, 0.56]]
    assert comparison.rows["others"] == pytest.approx(np.mean(others, axis=1))


@pytest.mark.parametrize("by_file", [False, True])
def test_aligned_heads_replace_the_least_aligned(files, tmp_path, by_file):
    named = write_scores(tmp_path / "heads.json", [[0.0, 1.0], [1.0, 0.1]]) if by_file else "L1H1,L0H0"
    comparison = compare(files, aligned=str(named))
    assert comparison.title == "aligned"
    assert comparison.rows["mean"] == pytest.approx([0.35, 0.445])


def test_a_run_is_compared_only_with_scores_that_were_measured_alike(run, tmp_path, monkeypatch, capsys):
    assert compare([run]).names == ("before", "after")
    unlike = {"keys": KEYS | {"hera_select_mode": "mllm"}}
    write_scores(run / "hera/scores.json", AFTER, **unlike)
    problem = "hera_select_mode was llm, is mllm. Score both with the same recipe"
    with pytest.raises(ValueError, match=f"my_run has no scores before training that are comparable .*{problem}"):
        compare([run])
    assert len(show(run / "hera/scores.json").files) == 1
    printed = capsys.readouterr().out
    assert "aligned heads: L0H1 0.510, L2H0 0.250, mean 0.380, others" in printed
    assert problem in printed
    assert "selected" not in printed
    monkeypatch.chdir(tmp_path)  # the selection names the model some/model
    base = write_scores(Path("some/model/hera/scores.json"), BEFORE, **unlike)
    assert compare([run]).files[0].path == base


def test_layers_are_compared_if_the_first_file_names_layers(tmp_path):
    scores = ([0.3, 0.1, None], [0.35, 0.4, 0.2])
    files = [write_scores(tmp_path / f"{n}.json", BEFORE, layers=["L1"], layer_scores=s) for n, s in enumerate(scores)]
    assert compare(files, ["a", "b"]).table[:3] == [
        ["layer", "a", "b", "b − a"],
        ["L1", "0.1000", "0.4000", "+0.3000"],
        ["L0", "0.3000", "0.3500", "+0.0500"],
    ]
    for path in files:
        write_seen(path, tmp_path / "images", 0, heads=4)
    comparison = compare(files)
    assert "+0.175, noise unknown" in verdict(comparison)[1]
    page = write_report(comparison, tmp_path / "page.html").read_text()
    assert "the neighbors of L1 are unknown" in page
    assert "nan" not in page
    with pytest.raises(ValueError, match=r"^gallery: .*0\.json lists layers, .* add --heads"):
        write_gallery(files)


def test_the_verdict_has_the_interval_of_the_mean_over_the_stored_queries(run):
    before, after = (Neighbors.load(run / f"hera/{name}.json") for name in ("heads", "scores"))
    changes = []
    for query, teacher in enumerate(before.teacher.tolist()):
        shares = [
            np.mean([index in teacher for index in each.heads[layer, head, query].tolist()])
            for each in (before, after)
            for layer, head in ((0, 1), (2, 0))
        ]
        changes.append((sum(shares[2:]) - sum(shares[:2])) / 2)
    noise = 2.2 * np.std(changes, ddof=1) / ScoreFile.load(run / "hera/heads.json").provenance["samples"] ** 0.5
    assert f"± {noise:.3f})" in verdict(compare([run]))[1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{run}/hera/heads.json"], "report: .* is a single file; give two"),
        (["{run}", "--aligned", "L0H0,L99H0"], "--aligned: L99H0 has no score in"),
        (["{run}", "--output", "{run}/index"], "index.html exists and is not a file that this command writes"),
        (["{run}/images"], "report: .*images has no hera/scores.json; first run llamafactory-hera score"),
        (["{run}", "--eval", "{run}/images"], "--eval: .*images contains no table"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused(run, capsys, arguments, problem):
    (run / "index.html").write_text("mine")
    (run / "images").mkdir()
    assert main(["report", *(argument.format(run=run) for argument in arguments)]) == 2
    assert re.search(problem, capsys.readouterr().err)


def test_the_page_is_about_the_run_of_the_last_file(run, tmp_path):
    card = {"steps": 7, "objective": "contrastive", "weight": 0.5, "command": "train r.yaml"}
    (run / "hera/card.json").write_text(json.dumps(card | {"date": "2026-11-24T10:00"}))
    row = {"key": "demo/accuracy", "title": "Questions", "n": 9, "values": {"a": 30.0, "b": 41.0}}
    rows = [row | {"differences": {"b": [11.0, -2.0, 25.0]}}, row | {"key": "demo/size", "title": "Sizes"}]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/demo.json").write_text(json.dumps({"suite": "demo", "models": ["a", "b"], "rows": rows}))
    written = write_report(compare([run]), tmp_path / "new/page", tmp_path / "eval")
    page = written.read_text()
    assert "<h1>my_run</h1>" in page
    assert (
        "aligned heads L0H1, L2H0; teacher facebook/dinov2-large; 7 steps, objective contrastive, weight 0.5" in page
    )
    assert "<pre>train r.yaml</pre>" in page
    cells = re.findall("<td>([^<]*)", page)
    assert "; ".join(cells[:10]) == "demo; n; a; b; b − a [95%]; Questions; 9; 30.0; 41.0; +11.0 [−2.0, +25.0]"
    assert cells[10:14] == ["head", "before", "after", "after − before"]
    assert write_report(compare([run]), tmp_path / "new/page") == written  # replaces an earlier report
    assert page.count('src="data:image/webp;base64,') == 4  # two queries, both maps, all queries
    assert not re.search("[0-9a-f]{64}", page)


@pytest.mark.parametrize(
    ("after", "meaning"),
    [
        (AFTER, r"toward the teacher (MKNN 0.150 → 0.350, +0.200, noise unknown); the other heads changed by +0.004."),
        (BEFORE, r"measurably move (MKNN 0.150 → 0.150, +0.000, noise unknown): train longer, or raise hera_weight."),
        (
            np.subtract(BEFORE, 0.04).tolist(),
            r"away from the teacher (MKNN 0.150 → 0.110, -0.040, noise unknown); the ",
        ),
    ],
)
def test_the_verdict_follows_from_the_numbers(files, tmp_path, after, meaning):
    found, sentence = verdict(compare([files[0], write_scores(tmp_path / "x.json", after)], ["before", "HeRA"]))
    assert "the 5 least aligned heads find 1.5 (before) and " in found
    assert found.endswith(" (HeRA); unrelated features find 0.1.")
    assert meaning in sentence


def test_a_refusal_imports_no_torch(files):
    code = "import sys; from llamafactory_hera.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    refused = (["report", files[0]], ["select", "nothing.yaml"], ["score", "./nothing"], ["score", "."])
    for arguments in (*refused, ["doctor", files[0], "stray"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert (done.stdout, "Traceback" in done.stderr) == ("False\n", False)
        words = r"is a single file|nothing(.yaml)?: no such file or folder|\. needs a dataset; add --recipe|stray is n"
        assert re.search(words, done.stderr)


def test_a_name_has_the_same_color_in_every_picture():
    assert series_colors(["before", "SFT", "HeRA"]) == {"before": GRAY, "SFT": ORANGE, "HeRA": BLUE}
    assert series_colors(["HeRA", "x", "y"])["HeRA"] == BLUE
    assert len(set(series_colors([*"abcdefg", "hera"]).values())) == 8


HOSTILE = r"<script>alert(1)</script>|$\frac$"


def test_foreign_text_is_escaped_in_every_format(run, tmp_path):
    foreign = dict.fromkeys(("model", "dataset", "teacher"), HOSTILE)
    foreign["keys"] = KEYS | dict.fromkeys(("hera_select", "hera_select_mode"), HOSTILE)
    for name, scores in (("heads", BEFORE), ("scores", AFTER)):
        write_scores(run / f"hera/{name}.json", scores, **foreign)
    page = write_report(compare([run], [HOSTILE, f"{HOSTILE}2"]), tmp_path / "r")
    text = page.read_text()
    assert "<script" not in text
    assert all(rule in text for rule in ("default-src 'none'", "form-action 'none'", "base-uri 'none'"))
    assert "&lt;script&gt;" in text
    show(run / "hera/heads.json")
    assert (run / "hera/heads.png").stat().st_size > 10_000


# -- plots -----------------------------------------------------------------------------------------------------------


def scored(path: Path, n_layers: int, n_heads: int, **provenance) -> ScoreFile:
    values = np.random.default_rng(0).uniform(0.05, 0.5, (n_layers, n_heads))
    values[0, 1] = NAN
    return ScoreFile.load(write_scores(path / "heads.json", values.tolist(), **provenance))


def boxes(labels, renderer):
    visible = [label for label in labels if label.get_text() and label.get_visible()]
    return [(label.get_text(), label.get_window_extent(renderer)) for label in visible]


def ticks(axis):
    """Returns the visible labels of an axis, which also has labels beyond its ends."""
    low, high = sorted(axis.get_view_interval())
    drawn = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for tick in drawn for label in (tick.label1, tick.label2)]


@pytest.mark.parametrize("layers", [None, ["L1", "L0"]], ids=["heads", "layers"])
@pytest.mark.parametrize(("n_layers", "n_heads"), [(2, 4), (36, 32), (80, 128)])
def test_no_labels_overlap_and_none_is_cut_off(tmp_path, n_layers, n_heads, layers):
    file = scored(tmp_path, n_layers, n_heads, layers=layers)
    figure = draw_scores(file, file.chosen.items)
    figure.canvas.draw()
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
        assert figure.bbox.min[0] <= box.x0 <= box.x1 <= figure.bbox.max[0], name
        assert figure.bbox.min[1] <= box.y0 <= box.y1 <= figure.bbox.max[1], name


def test_marked_heads_have_frames_and_heads_without_a_score_have_crosses(tmp_path):
    axes = draw_scores(scored(tmp_path, 6, 8), Targets.parse("L4H2,L5H0").items).axes[0]
    frames = {(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in axes.patches}
    assert frames == {(4, 2), (5, 0)}
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("×", (1, 0))]


def test_curves_show_the_best_head_the_layer_and_the_worst_head_and_rings_mark_layers(tmp_path):
    file = scored(tmp_path, 6, 8)
    axes = draw_scores(file, Targets.parse("L4,L1", "layer").items).axes[1]
    curves = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(curves["best head of the layer"], np.nanmax(file.scores, axis=1))
    np.testing.assert_allclose(curves["worst head of the layer"], np.nanmin(file.scores, axis=1))
    np.testing.assert_allclose(curves["layer output"], 0.2)
    np.testing.assert_allclose(curves["chance"], file.chance)
    rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert [line.get_xdata()[0] for line in rings] == [4, 1]


def test_a_layer_without_any_score_is_drawn_and_printed(run, capsys):
    path = write_scores(run / "hera/scores.json", [[NAN] * 4, *AFTER[1:]])
    show(path)
    assert Image.open(path.with_suffix(".png")).size[0] > 500
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("aligned heads: L0H1 0.500 -> nan, L2H0 0.050 -> 0.250, mean 0.275 -> nan, others ")
