"""Before and after: the same heads in every file, and nothing compared that cannot be."""

import math

import pytest
from PIL import Image

from llamafactory_hera.selection.report import compare, render_markdown, write_report

from .score_files import write_scores

BEFORE = [[0.10, 0.50, 0.30, 0.20], [0.15, 0.60, 0.25, 0.40], [0.05, 0.35, 0.45, 0.55]]
AFTER = [[0.30, 0.51, 0.31, 0.40], [0.35, 0.59, 0.45, 0.41], [0.25, 0.36, 0.44, 0.56]]


@pytest.fixture
def files(tmp_path):
    return [
        write_scores(tmp_path / "base/hera/heads.json", BEFORE),
        write_scores(tmp_path / "run/hera/scores.json", AFTER),
    ]


def test_worst_and_top_are_those_of_the_first_file(files):
    comparison = compare(files)
    assert " ".join(map(str, comparison.worst)) == "L2H0 L0H0 L1H0 L0H3 L1H2"
    assert " ".join(map(str, comparison.top)) == "L1H1 L2H3 L0H1 L2H2 L1H3"
    assert comparison.names == ("base", "run")


def test_the_page_holds_every_head_and_the_means(files):
    page = render_markdown(compare(files), "x.png")
    assert "| L2H0 | 0.0500 | 0.2500 | +0.2000 |" in page
    assert "| **worst-5 mean** | 0.1500 | 0.3500 | +0.2000 |" in page
    assert "| **top-5 mean** | 0.5000 | 0.5020 | +0.0020 |" in page
    assert "0.0100" in page  # chance
    assert "![MKNN of the worst and top heads](x.png)" in page


def test_layers_are_compared_where_the_first_file_names_layers(tmp_path):
    own = ([0.3, 0.1, None], [0.35, 0.4, 0.2])
    files = [
        write_scores(tmp_path / f"{name}/hera/scores.json", BEFORE, layers=["L1"], layer_scores=scores)
        for name, scores in zip(("base", "run"), own, strict=True)
    ]
    page = render_markdown(compare(files), "x.png")
    assert "| layer | base | run | change |" in page
    assert "| L1 | 0.1000 | 0.4000 | +0.3000 |" in page
    assert "| **worst-2 mean** | 0.2000 | 0.3750 | +0.1750 |" in page
    assert "Worst and top layers are those of base." in page
    write_report(files, tmp_path / "report")
    assert Image.open(tmp_path / "report.png").size[0] > 1000


def test_picture_and_page_are_written(files, tmp_path):
    third = write_scores(tmp_path / "other/hera/scores.json", BEFORE)
    picture, page = write_report([*files, third], tmp_path / "new/report", names=["before", "after", "sft"])
    assert (picture, page) == (tmp_path / "new/report.png", tmp_path / "new/report.md")
    assert Image.open(picture).size[0] > 1000
    assert "| head | before | after | sft | change |" in page.read_text()
    assert {path.name for path in picture.parent.iterdir()} == {"report.png", "report.md"}


def test_names_fall_back_to_what_differs(tmp_path):
    one, two = (write_scores(tmp_path / f"run/hera/{name}.json", BEFORE) for name in ("heads", "scores"))
    assert compare([one, two]).names == ("heads", "scores")
    assert len(set(compare([one, one]).names)) == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"teacher_fingerprint": "d" * 64}, "teacher (bbbbbbbb…, dddddddd…)"),
        ({"samples_digest": "d" * 64}, "images"),
        ({"mode": "mllm"}, "mode (llm, mllm)"),
        ({"k": 5}, "k (10, 5)"),
        ({"pooling": "last"}, "pooling (answer, last)"),
        ({"similarity": "dot"}, "similarity (cosine, dot)"),
    ],
)
def test_files_of_other_settings_are_refused(files, changed, said):
    write_scores(files[1], AFTER, **changed)
    with pytest.raises(ValueError, match=r"report: .* cannot be compared") as error:
        compare(files)
    assert said in str(error.value)


def test_files_of_another_shape_are_refused(files):
    write_scores(files[1], AFTER[:2])
    with pytest.raises(ValueError, match="number of heads"):
        compare(files)


def test_one_file_is_not_enough(files):
    with pytest.raises(ValueError, match="two score files or more"):
        compare(files[:1])
    with pytest.raises(ValueError, match="1 names for 2 files"):
        compare(files, ["before"])


def test_hand_written_heads_hold_no_scores(files, tmp_path):
    (tmp_path / "hand.json").write_text('{"heads": ["L0H0"]}')
    with pytest.raises(ValueError, match=r"hand\.json names heads and holds no scores"):
        compare([files[0], tmp_path / "hand.json"])


def test_a_head_that_is_lost_afterwards_is_shown_as_nan(files):
    write_scores(files[1], [[math.nan, *AFTER[0][1:]], *AFTER[1:]])
    assert "| L0H0 | 0.1000 | nan | +nan |" in render_markdown(compare(files), "x.png")


def test_an_output_that_cannot_be_written_is_named(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"report: .*file/report cannot be written"):
        write_report(files, tmp_path / "file/report")
