"""The choice among scores, the printed table, and the check that two files are comparable."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from llamafactory_hera.config import selection_keys
from llamafactory_hera.heads import Target
from llamafactory_hera.selection.firmness import permuted_scores
from llamafactory_hera.selection.scores import (
    SAME_RUN,
    SAME_SCORES,
    SAME_SELECTION,
    ScoreFile,
    choose_targets,
    command_line,
    differences,
    load_files,
    rank_targets,
    render_table,
)

from .tiny import settings, write_scores

NAN = math.nan
SCORES = [[0.5, 0.1, 0.3], [0.1, 0.9, NAN], [0.2, 0.2, 0.1], [0.4, 0.6, 0.5]]
LAYERS = [0.3, 0.1, NAN, 0.2, 0.1]


def names(targets):
    return " ".join(map(str, targets))


def test_equal_scores_are_ordered_by_layer_then_head_and_keep_their_value():
    assert names(rank_targets(SCORES)) == "L0H1 L1H0 L2H2 L2H0 L2H1 L0H2 L3H0 L0H0 L3H2 L3H1 L1H1"
    assert rank_targets(LAYERS) == {Target(1): 0.1, Target(4): 0.1, Target(3): 0.2, Target(0): 0.3}


@pytest.mark.parametrize(
    ("scores", "strategy", "m", "chosen"),
    [
        (SCORES, "worst", 3, "L0H1 L1H0 L2H2"),
        (SCORES, "top", 4, "L1H1 L3H1 L0H0 L3H2"),
        (SCORES, "middle", 2, "L2H2 L2H0"),
        (SCORES[:3], "middle", 1, "L1H0"),
        (LAYERS, "worst", 3, "L1 L4 L3"),
        (LAYERS, "top", 2, "L0 L3"),
    ],
)
def test_each_strategy_chooses_its_heads_or_layers(scores, strategy, m, chosen):
    assert names(choose_targets(scores, strategy, m)) == chosen


@pytest.mark.parametrize("scores", [SCORES, LAYERS], ids=["heads", "layers"])
def test_a_random_choice_depends_only_on_the_seed(scores):
    drawn = {choose_targets(scores, "random", 3, seed) for seed in range(8)}
    assert len(drawn) > 1
    assert all(chosen == tuple(sorted(chosen)) for chosen in drawn)
    assert choose_targets(1 - np.array(scores), "random", 3, 5) == choose_targets(scores, "random", 3, 5)


@pytest.mark.parametrize(
    ("scores", "strategy", "m", "number"),
    [(SCORES, "worst", 12, "11 heads"), (SCORES, "middle", 4, "3 heads"), (LAYERS, "worst", 5, "4 layers")],
)
def test_choosing_more_heads_than_have_a_score_is_refused(scores, strategy, m, number):
    with pytest.raises(ValueError, match=f"hera_select_m: {m} is more than the {number} that hera_select: {strategy}"):
        choose_targets(scores, strategy, m)


def test_the_table_shows_both_ends_the_choice_and_heads_without_a_score(tmp_path):
    values = np.random.default_rng(0).uniform(0.05, 0.5, (3, 4))
    values[0, 1] = NAN
    file = ScoreFile.load(write_scores(tmp_path / "heads.json", values.tolist()))
    table, ranked = render_table(file).splitlines(), file.ranked()
    (worst, low), *_, (top, high) = ranked.items()
    assert table[0].startswith("11 heads on 1000 samples of captions, teacher facebook/dinov2-large, mode llm, k=10, ")
    cells = [f"{worst}*", f"{low:.4f}", f"{low / 0.01:.2f}x", f"{top}", f"{high:.4f}", f"{high / 0.01:.2f}x"]
    assert table[3].split() == ["1", *cells]
    assert table[-6:-4] == ["no score (NaN or infinity): L0H1", f"selected (worst): {file.chosen}"]
    firm = f"{file.chosen.items[0]} 0.0200 0.0100 0.0100 ± 0.0020 +5.0 93/100"
    assert table[-3].split() == firm.split()
    correlation = "The rank correlation of two halves is 0.81."
    assert table[-1].startswith(f"{correlation} Mean score by sample count: 0.2000 for 250 ")


BEFORE = {"model": "m", "teacher": "t", "dataset": "d", "samples": 40, "model_fingerprint": "a" * 64}
BEFORE |= {"teacher_fingerprint": "b" * 64, "samples_digest": "c" * 64}
OTHER = "9" * 64


def origin(**changed):
    keys = {name: value for name, value in changed.items() if name not in BEFORE}
    return BEFORE | changed | {"keys": selection_keys(settings(**keys))}


@pytest.mark.parametrize(
    ("changed", "decides", "difference"),
    [
        ({"select_m": 2}, (SAME_SELECTION, SAME_RUN), "hera_select_m was 3, is 2"),
        ({"select": "top"}, (SAME_SELECTION,), "hera_select was worst, is top"),
        ({"select_mode": "mllm"}, (SAME_SELECTION, SAME_SCORES), "hera_select_mode was auto, is mllm"),
        ({"similarity": "dot"}, (SAME_SELECTION, SAME_SCORES), "hera_similarity was cosine, is dot"),
        ({"select_batch_size": 2}, (), ""),
        ({"model_fingerprint": OTHER}, (SAME_SELECTION, SAME_RUN), "model was m (fingerprint aaaaaaaa), is m (finger"),
        ({"teacher": "u"}, (), ""),  # another name for the same weights
        ({"teacher_fingerprint": OTHER}, (SAME_SELECTION, SAME_RUN, SAME_SCORES), "teacher was t (fingerprint bbb"),
        ({"dataset": "e"}, (SAME_SELECTION,), "dataset was d, is e"),
        ({"samples_digest": OTHER}, (SAME_SCORES,), "samples was 40 (fingerprint cccccccc), is 40 (fingerprint 9"),
    ],
)
def test_each_entry_counts_only_in_its_comparisons(changed, decides, difference):
    for names in (SAME_SELECTION, SAME_RUN, SAME_SCORES):
        found = differences(origin(), origin(**changed), names)
        assert len(found) == (names in decides)
        assert all(line.startswith(difference) for line in found)


def test_scores_of_another_model_are_refused(tmp_path):
    files = [write_scores(tmp_path / "one.json", SCORES), write_scores(tmp_path / "two.json", SCORES[:2])]
    with pytest.raises(ValueError, match=r"report: .*one.json and .*two.json cannot be compared: they differ in"):
        load_files(files, (), "report")


def test_files_are_named_by_their_folders_or_by_their_paths(tmp_path):
    one, two = (write_scores(tmp_path / f"{run}/hera/scores.json", SCORES) for run in ("before", "after"))
    assert load_files([tmp_path / "before", two], (), "report")[1] == ["before", "after"]
    assert load_files([one, one], (), "report")[1] == [str(one), str(one)]
    with pytest.raises(ValueError, match="report: 1 names for 2 files"):
        load_files([one, two], ["before"], "report")


def test_a_file_without_scores_is_refused(tmp_path):
    (tmp_path / "hand.json").write_text('{"heads": ["L0H0"]}')
    with pytest.raises(ValueError, match=r"scores: .*hand.json has no scores; write a file with"):
        ScoreFile.load(tmp_path / "hand.json")


SHAPES = [{"scores": [[1.0], []]}, {"scores": [[None, None]]}, {"layer_scores": []}]


@pytest.mark.parametrize(
    "changed", [{"dataset": ["d"]}, {"keys": []}, {"samples": "1"}, {"chance_level": None}, *SHAPES], ids=str
)
def test_a_file_with_entries_of_other_types_or_shapes_is_refused(tmp_path, changed):
    path = write_scores(tmp_path / "heads.json", SCORES, **changed)
    with pytest.raises(ValueError, match=r"heads\.json is not a file .*that a selection"):
        ScoreFile.load(path)


@pytest.mark.parametrize("script", [True, False])
def test_a_command_line_can_be_repeated_in_a_shell_and_contains_no_secrets(monkeypatch, script):
    started = f"{Path(sys.executable).parent}/llamafactory-cli" if script else "-m"
    arguments = ["train", "a b.yaml", "hub_token=hf_x", "--hub_token", "hf_y"]
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, started, *arguments])
    first = "llamafactory-cli" if script else f"{sys.executable} -m"
    assert command_line() == f"{first} train 'a b.yaml' hub_token=… --hub_token …"


def test_a_permutation_of_the_teachers_samples_relabels_its_neighbors():
    """If every sample is a neighbor of all others, no permutation changes the neighbors."""
    others = np.array([[j for j in range(6) if j != i] for i in range(6)])
    assert (permuted_scores(others, others, np.random.default_rng(0)) == 1).all()
