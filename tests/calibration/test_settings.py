"""The ``rah_*`` keys: defaults, ranges, and layers."""

from typing import Any

import pytest

from llamafactory_hera.calibration.settings import RahConfig


def test_the_defaults_are_those_of_the_paper() -> None:
    config = RahConfig()
    assert (config.p_isal, config.p_caf, config.k, config.w_v, config.w_o) == (15, 70, 3, 0.7, 0.3)
    assert (config.trim, config.rho, config.rank, config.delta, config.alpha_max) == (0.1, 0.6, 8, 0.05, 0.15)
    assert (config.probes, config.samples) == (32, 100)
    assert config.layer_indices(32) == list(range(16))


def test_the_help_marks_the_defaults_that_are_ours() -> None:
    ours = {"held_out", "batch_size", "text", "positions", "caf_lambda", "beta", "halvings"}
    knobs = RahConfig.knobs().values()
    assert {declared.name for declared in knobs if "ours)" in declared.metadata["help"]} == ours


LAYERS = {"all": [0, 1, 2, 3, 4], "first_half": [0, 1], "1-3": [1, 2, 3], "4,0-1": [0, 1, 4], 2: [2], (0, 3): [0, 3]}


@pytest.mark.parametrize("text", LAYERS)
def test_layers(text: Any) -> None:
    assert RahConfig.from_keys({"rah_layers": text}).layer_indices(5) == LAYERS[text]
    assert RahConfig().layer_indices(1) == [0]  # the first half of a single layer


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"rah_layers": "0..3"}, r"rah_layers: '0\.\.3' .*0-15"),
    "layers in reverse": ({"rah_layers": "5-3"}, "rah_layers: '5-3'"),
    "a layer that the model lacks": ({"rah_layers": "3-9"}, "rah_layers: the model has no layer 9.*0 to 4"),
    "too few samples": ({"rah_samples": 50}, "rah_samples: 50 .*rah_probes: 32; raise"),
    "no weights": ({"rah_w_v": 0, "rah_w_o": 0}, "rah_w_v: 0 and rah_w_o: 0 .*rah_rho: 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        RahConfig.from_keys(values).layer_indices(5)
    RahConfig(w_v=0, w_o=0, rho=1)  # weights without effect may be zero
