"""What is chosen by scores, the table, and before beside after: the same heads in every file, nothing incomparable."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamafactory_hera.heads import Target
from llamafactory_hera.keys import Role
from llamafactory_hera.selection.pictures import write_report
from llamafactory_hera.selection.scores import (
    ScoreFile,
    choose_targets,
    command_line,
    compare,
    differences,
    rank_targets,
    render_markdown,
    render_table,
)

from .tiny import settings, write_scores

NAN = math.nan
SCORES = [[0.5, 0.1, 0.3], [0.1, 0.9, NAN], [0.2, 0.2, 0.1], [0.4, 0.6, 0.5]]
LAYERS = [0.3, 0.1, NAN, 0.2, 0.1]

BEFORE = [[0.10, 0.50, 0.30, 0.20], [0.15, 0.60, 0.25, 0.40], [0.05, 0.35, 0.45, 0.55]]
AFTER = [[0.30, 0.51, 0.31, 0.40], [0.35, 0.59, 0.45, 0.41], [0.25, 0.36, 0.44, 0.56]]


def names(targets):
    return " ".join(map(str, targets))


def test_equal_scores_are_ordered_by_layer_then_head_and_keep_their_value():
    assert names(rank_targets(SCORES)) == "L0H1 L1H0 L2H2 L2H0 L2H1 L0H2 L3H0 L0H0 L3H2 L3H1 L1H1"
    assert rank_targets(LAYERS) == {Target(1): 0.1, Target(4): 0.1, Target(3): 0.2, Target(0): 0.3}


@pytest.mark.parametrize(
    ("scores", "strategy", "m", "chosen"),
    [
        (SCORES, "worst", 3, "L0H1 L1H0 L2H2"),
        (SCORES, "top", 4, "L1H1 L3H1 L0H0 L3H2"),  # most first, with the same rule for equal scores
        (SCORES, "middle", 2, "L2H2 L2H0"),
        (SCORES[:3], "middle", 1, "L1H0"),
        (LAYERS, "worst", 3, "L1 L4 L3"),
        (LAYERS, "top", 2, "L0 L3"),
    ],
)
def test_what_a_strategy_chooses(scores, strategy, m, chosen):
    assert names(choose_targets(scores, strategy, m)) == chosen


@pytest.mark.parametrize("scores", [SCORES, LAYERS], ids=["heads", "layers"])
def test_random_depends_on_the_seed_alone(scores):
    drawn = {choose_targets(scores, "random", 3, seed) for seed in range(8)}
    assert len(drawn) > 1
    assert all(chosen == tuple(sorted(chosen)) for chosen in drawn)
    assert choose_targets(1 - np.array(scores), "random", 3, 5) == choose_targets(scores, "random", 3, 5)


@pytest.mark.parametrize("strategy", ["worst", "top", "random", "middle"])
def test_a_head_without_a_score_is_never_taken(strategy):
    scores = [[0.5, NAN], [NAN, 0.2], [0.1, NAN]]
    taken = choose_targets(scores, strategy, 1 if strategy == "middle" else 3)
    assert not [head for head in taken if math.isnan(scores[head.layer][head.head])]


@pytest.mark.parametrize(
    ("scores", "strategy", "m", "number"),
    [
        (SCORES, "worst", 12, "heads are asked for, and hera_select: worst has 11"),
        (SCORES, "middle", 4, "heads are asked for, and hera_select: middle has 3 in layer L2"),
        (LAYERS, "worst", 5, "layers are asked for, and hera_select: worst has 4"),
    ],
)
def test_too_few_with_a_score_name_the_key(scores, strategy, m, number):
    with pytest.raises(ValueError, match=f"hera_select_m: {m} {number} to choose from; lower it"):
        choose_targets(scores, strategy, m)


def test_the_table_names_extremes_choice_and_what_is_broken(tmp_path):
    values = np.random.default_rng(0).uniform(0.05, 0.5, (3, 4))
    values[0, 1] = NAN
    file = ScoreFile.load(write_scores(tmp_path / "heads.json", values.tolist()))
    table, ranked = render_table(file), file.ranked()
    (worst, low), *_, (top, high) = ranked.items()
    first = next(line for line in table.splitlines() if line.startswith("  1"))
    assert f"{worst}* {low:.4f}" in first
    assert f"{top}  {high:.4f}" in first
    assert f"{low / 0.01:.2f}x" in first
    assert "11 heads on 1000 samples, k=10, chance level 0.0100" in table
    assert "not scored (NaN or infinity): L0H1" in table
    assert table.splitlines()[-1] == f"selected (worst): {file.chosen}"


def test_the_table_of_layers(tmp_path):
    own = [0.3, 0.02, None, 0.1]
    path = write_scores(tmp_path / "layers.json", [[0.2]] * 4, layers=["L1", "L3"], layer_scores=own)
    table = render_table(ScoreFile.load(path)).splitlines()
    assert table[0] == "3 layers on 1000 samples, k=10, chance level 0.0100"
    assert [line.split() for line in table[3:6]] == [
        ["1", "L1*", "0.0200", "2.00x", "L0", "0.3000", "30.00x"],
        ["2", "L3*", "0.1000", "10.00x", "L3*", "0.1000", "10.00x"],
        ["3", "L0", "0.3000", "30.00x", "L1*", "0.0200", "2.00x"],
    ]
    assert table[6:] == ["not scored (NaN or infinity): L2", "selected (worst): L1,L3"]


# -- where scores come from ------------------------------------------------------------------------------------------

NOW = {"model": "m", "teacher": "t", "dataset": "d", "model_fingerprint": "a" * 64, "teacher_fingerprint": "b" * 64}
NOW |= {"samples_digest": "c" * 64}
MODEL = "model_name_or_path was m (fingerprint aaaaaaaa), is n (fingerprint 99999999)"
TEACHER = "hera_teacher was t (fingerprint bbbbbbbb), is u (fingerprint 99999999)"
IMAGES = "dataset was d (fingerprint cccccccc), is d (fingerprint 99999999)"
BOTH, ALL = {Role.SELECTS, Role.SCORES}, {Role.SELECTS, Role.SCORES, Role.TRAINS}


def facts(**keys):
    return settings(**keys).facts(*ALL) | NOW


@pytest.mark.parametrize(
    ("other", "roles", "shown"),
    [
        (facts(select_m=2), {Role.SELECTS, Role.TRAINS}, "hera_select_m was 3, is 2"),
        (facts(select="top"), {Role.SELECTS}, "hera_select was worst, is top"),
        (facts(select_samples=9), {Role.SELECTS}, "hera_select_samples was 40, is 9"),
        (facts(select_mode="mllm"), BOTH, "hera_select_mode was llm, is mllm"),
        (facts(similarity="dot"), BOTH, "hera_similarity was cosine, is dot"),
        (facts(select_batch_size=2), set(), ""),
        (facts() | {"model": "n", "model_fingerprint": "9" * 64}, {Role.SELECTS, Role.TRAINS}, MODEL),
        (facts() | {"teacher": "u", "teacher_fingerprint": "9" * 64}, ALL, TEACHER),
        (facts() | {"dataset": "e"}, {Role.SELECTS}, "dataset was d, is e"),
        (facts() | {"samples_digest": "9" * 64}, {Role.SCORES}, IMAGES),
    ],
)
def test_what_each_fact_decides(other, roles, shown):
    for role in ALL:
        assert differences(facts(), other, role) == ([shown] if role in roles else [])


def test_a_fact_that_an_older_file_lacks_is_not_compared():
    older = {fact: value for fact, value in facts().items() if fact != "similarity"}
    assert differences(older, facts(similarity="dot"), Role.SELECTS) == []


def test_a_command_is_shown_as_a_shell_takes_it_and_without_secrets(monkeypatch):
    folder, told = Path(sys.executable).parent, ["train", "a b.yaml", "hub_token=hf_x", "--hub_token", "hf_y"]
    shown = "train 'a b.yaml' hub_token=… --hub_token …"
    for started, first in ((f"{folder}/llamafactory-cli", "llamafactory-cli"), ("-m", f"{sys.executable} -m")):
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, started, *told])
        assert command_line() == f"{first} {shown}"


# -- before and after ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    return [
        write_scores(tmp_path / "base/hera/heads.json", BEFORE),
        write_scores(tmp_path / "run/hera/scores.json", AFTER),
    ]


def test_worst_and_top_are_those_of_the_first_file_and_the_page_holds_them_and_their_means(files):
    comparison = compare(files)
    assert {title: " ".join(rows) for title, rows in comparison.groups.items()} == {
        "worst-5": "L2H0 L0H0 L1H0 L0H3 L1H2 mean",
        "top-5": "L1H1 L2H3 L0H1 L2H2 L1H3 mean",
    }
    assert comparison.names == ["base", "run"]
    page = render_markdown(comparison, "x.png")
    assert "| L2H0 | 0.0500 | 0.2500 | +0.2000 |" in page
    assert "| **worst-5 mean** | 0.1500 | 0.3500 | +0.2000 |" in page
    assert "| **top-5 mean** | 0.5000 | 0.5020 | +0.0020 |" in page
    assert "0.0100" in page  # chance
    assert "![MKNN of the worst and top heads](x.png)" in page


def test_aligned_heads_stand_in_the_place_of_the_worst(files, tmp_path):
    for aligned in ("L1H1,L0H0", str(write_scores(tmp_path / "heads.json", [[0.0, 1.0], [1.0, 0.1]]))):
        comparison = compare(files, aligned=aligned)
        assert list(comparison.groups) == ["aligned", "top-5"]
        assert comparison.groups["aligned"]["mean"] == pytest.approx([0.35, 0.445])
    page = write_report(files, tmp_path / "report", aligned=aligned)[1].read_text()
    assert "| **aligned mean** | 0.3500 | 0.4450 | +0.0950 |" in page
    assert " Top heads are those of base." in page


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
    assert compare([one, two]).names == ["heads", "scores"]
    assert compare([one, one]).names == [str(one), str(one)]


@pytest.mark.parametrize(
    ("scores", "changed", "shown"),
    [
        (AFTER, {"samples_digest": "d" * 64}, "dataset was captions (fingerprint cccccccc), is"),
        (AFTER, {"k": 5}, "hera_select_k was 10, is 5"),
        (AFTER[:2], {}, "number of heads"),
    ],
)
def test_files_of_other_settings_or_shapes_are_refused(files, scores, changed, shown):
    write_scores(files[1], scores, **changed)
    with pytest.raises(ValueError, match=r"report: .* cannot be compared") as error:
        compare(files)
    assert shown in str(error.value)


def test_a_head_that_is_lost_afterwards_is_shown_as_nan(files):
    write_scores(files[1], [[NAN, *AFTER[0][1:]], *AFTER[1:]])
    assert "| L0H0 | 0.1000 | nan | +nan |" in render_markdown(compare(files), "x.png")


def test_what_cannot_be_compared_or_written_is_named(files, tmp_path):
    with pytest.raises(ValueError, match="two score files or more"):
        compare(files[:1])
    with pytest.raises(ValueError, match="1 names for 2 files"):
        compare(files, ["before"])
    with pytest.raises(ValueError, match=r"^--aligned: L99H0 has no score in .*; name others"):
        compare(files, aligned="L0H0,L99H0")
    (tmp_path / "hand.json").write_text('{"heads": ["L0H0"]}')
    with pytest.raises(ValueError, match=r"hand\.json names heads and holds no scores"):
        compare([files[0], tmp_path / "hand.json"])
    with pytest.raises(ValueError, match=r"nope\.json cannot be read .*; give a file that `llamafactory-hera score`"):
        compare([files[0], tmp_path / "nope.json"])
    with pytest.raises(ValueError, match=r"report: .*hand.json/report cannot be written"):
        write_report(files, tmp_path / "hand.json/report")


def test_a_report_does_not_wait_for_torch(tmp_path):
    files = [str(write_scores(tmp_path / f"{n}.json", scores)) for n, scores in enumerate((BEFORE, AFTER))]
    code = "import sys; from llamafactory_hera.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, "report", *files, "--output", str(tmp_path / "report")],
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines()[-1] == "0 False", run.stdout + run.stderr
