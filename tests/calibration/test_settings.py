"""The rah_* keys: defaults, types, ranges, layers."""

from typing import Any

import pytest

from llamafactory_hera.calibration.settings import RahConfig


def test_the_papers_defaults() -> None:
    s = RahConfig()
    assert (s.p_isal, s.p_caf, s.k, s.w_v, s.w_o, s.trim, s.rho) == (15, 70, 3, 0.7, 0.3, 0.1, 0.6)
    assert (s.rank, s.delta, s.alpha_max, s.probes, s.samples) == (8, 0.05, 0.15, 32, 100)
    assert s.layer_indices(32) == list(range(16))


def test_every_key_has_a_help_that_says_when_it_is_ours() -> None:
    silent = {"held_out", "batch_size", "text", "positions", "caf_lambda", "beta", "halvings"}
    for declared in RahConfig.knobs().values():
        assert declared.metadata["help"].endswith(".")
        assert ("ours)" in declared.metadata["help"]) == (declared.name in silent), declared.name


LAYERS = {"all": [0, 1, 2, 3, 4], "first_half": [0, 1], "1-3": [1, 2, 3], "4,0-1": [0, 1, 4], 2: [2], (0, 3): [0, 3]}


@pytest.mark.parametrize("text", LAYERS)
def test_layers(text: Any) -> None:
    config = RahConfig.from_keys({"rah_layers": text, "rah_rank": "full"})
    assert (config.layer_indices(5), config.rank) == (LAYERS[text], "full")
    assert RahConfig().layer_indices(1) == [0]  # a single layer has a first half


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown": ({"rah_rnak": 4}, ["rah_rnak", "rah_rank"]),
    "anchors below the mean": ({"rah_beta": -0.1}, ["rah_beta", "-0.1", "0 or more"]),
    "negative seed": ({"rah_seed": -1}, ["rah_seed", "-1", "0 or more"]),
    "negative bound": ({"rah_delta": -0.1}, ["rah_delta", "-0.1", "0 or more"]),
    "percentile": ({"rah_p_isal": 120}, ["rah_p_isal", "120", "0 or more, up to 100"]),
    "trim": ({"rah_trim": 0.5}, ["rah_trim", "0.5", "less than 0.5"]),
    "alpha": ({"rah_alpha_max": 0}, ["rah_alpha_max", "0", "more than 0"]),
    "rank": ({"rah_rank": "half"}, ["rah_rank", "'half'", "full"]),
    "rank 0": ({"rah_rank": 0}, ["rah_rank", "0", "1 or more (or full)"]),
    "rule": ({"rah_targets": "best"}, ["rah_targets", "'best'", "paper, no_caf, random, inverse"]),
    "layers": ({"rah_layers": "0..3"}, ["rah_layers", "'0..3'", "0-15"]),
    "layers backwards": ({"rah_layers": "5-3"}, ["rah_layers", "'5-3'"]),
    "too few samples": ({"rah_samples": 50}, ["rah_samples", "50", "rah_probes", "32", "raise"]),
    "no weights": ({"rah_w_v": 0, "rah_w_o": 0}, ["rah_w_v", "rah_w_o", "rah_rho: 1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name: str) -> None:
    values, expected = BAD[name]
    with pytest.raises(ValueError) as error:
        RahConfig.from_keys(values)
    assert all(part in str(error.value) for part in expected), error.value


def test_a_layer_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match=r"rah_layers: 3-9 names layer 9.*layers 0 to 4"):
        RahConfig(layers="3-9").layer_indices(5)
