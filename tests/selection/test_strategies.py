"""Which heads a strategy takes."""

import math

import pytest

from llamafactory_hera.selection.strategies import choose_heads, choose_layers, ranking

NAN = math.nan
SCORES = [[0.5, 0.1, 0.3], [0.1, 0.9, NAN], [0.2, 0.2, 0.1], [0.4, 0.6, 0.5]]


def names(heads):
    return " ".join(map(str, heads))


def test_equal_scores_are_ordered_by_layer_then_head():
    assert names(ranking(SCORES)) == "L0H1 L1H0 L2H2 L2H0 L2H1 L0H2 L3H0 L0H0 L3H2 L3H1 L1H1"


def test_worst_is_least_first():
    assert names(choose_heads(SCORES, "worst", 3)) == "L0H1 L1H0 L2H2"


def test_top_is_most_first_with_the_same_rule_for_equal_scores():
    assert names(choose_heads(SCORES, "top", 4)) == "L1H1 L3H1 L0H0 L3H2"


def test_middle_takes_the_least_aligned_of_the_middle_layer():
    assert names(choose_heads(SCORES, "middle", 2)) == "L2H2 L2H0"
    assert names(choose_heads(SCORES[:3], "middle", 1)) == "L1H0"


def test_random_depends_on_the_seed_alone():
    drawn = {choose_heads(SCORES, "random", 3, seed) for seed in range(8)}
    assert len(drawn) > 1
    assert choose_heads(SCORES, "random", 3, 5) == choose_heads(SCORES, "random", 3, 5)
    other_scores = [[1 - score for score in row] for row in SCORES]
    assert choose_heads(other_scores, "random", 3, 5) == choose_heads(SCORES, "random", 3, 5)


@pytest.mark.parametrize("strategy", ["worst", "top", "random", "middle"])
def test_a_head_without_a_score_is_never_taken(strategy):
    scores = [[0.5, NAN], [NAN, 0.2], [0.1, NAN]]
    taken = choose_heads(scores, strategy, 1 if strategy == "middle" else 3)
    assert not [head for head in taken if math.isnan(scores[head.layer][head.head])]


@pytest.mark.parametrize(("strategy", "m"), [("worst", 12), ("middle", 4)])
def test_too_few_heads_name_the_key(strategy, m):
    with pytest.raises(ValueError, match=f"hera_select_m: {m} "):
        choose_heads(SCORES, strategy, m)


def test_layers_are_chosen_as_heads_are():
    scores = [0.3, 0.1, float("nan"), 0.2, 0.1]
    assert choose_layers(scores, "worst", 3) == (1, 4, 3)
    assert choose_layers(scores, "top", 2) == (0, 3)
    chosen = choose_layers(scores, "random", 3, seed=1)
    assert chosen == choose_layers(scores, "random", 3, seed=1) == tuple(sorted(chosen))
    assert 2 not in chosen
    with pytest.raises(ValueError, match="hera_select_m: 5 layers are asked for, and 4 have a score; lower it"):
        choose_layers(scores, "worst", 5)
