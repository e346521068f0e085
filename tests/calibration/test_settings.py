"""The preparation of a calibration: the ``rah_*`` keys, the command, and the draw of samples."""

import os
from pathlib import Path
from typing import Any

import pytest

from llamafactory_hera.calibration.run import check_tokens, draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.cli import main
from llamafactory_hera.integrations.llamafactory import commands
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import IMAGE, calibration_model, rows_of
from tests.tiny_models import noise_images

# -- keys ------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_paper():
    config = RahConfig()
    assert (config.p_isal, config.p_caf, config.k, config.w_v, config.w_o) == (15, 70, 3, 0.7, 0.3)
    assert (config.trim, config.rho, config.rank, config.delta, config.alpha_max) == (0.1, 0.6, 8, 0.05, 0.15)
    assert (config.probes, config.samples) == (32, 100)
    assert config.layer_indices(32) == list(range(16))


LAYERS = {"all": [0, 1, 2, 3, 4], "first_half": [0, 1], "1-3": [1, 2, 3], "4,0-1": [0, 1, 4], 2: [2], (0, 3): [0, 3]}


@pytest.mark.parametrize("text", LAYERS)
def test_layers_are_read_from_words_numbers_and_ranges(text):
    assert RahConfig.from_keys({"rah_layers": text}).layer_indices(5) == LAYERS[text]
    assert RahConfig().layer_indices(1) == [0]  # half of one layer is rounded up


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"rah_layers": "0..3"}, r"rah_layers: '0\.\.3' .*0-15"),
    "layers beyond any model": ({"rah_layers": "0-999999999"}, "rah_layers: '0-999999999' cannot be read"),
    "layers in reverse": ({"rah_layers": "5-3"}, "rah_layers: '5-3'"),
    "a layer that the model lacks": ({"rah_layers": "3-9"}, "rah_layers: the model has no layer 9.*0 to 4"),
    "too few samples": ({"rah_samples": 50}, "rah_samples: 50 .*rah_probes: 32; raise"),
    "no weights": ({"rah_w_v": 0, "rah_w_o": 0}, "rah_w_v: 0 and rah_w_o: 0 .*rah_rho: 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused(name):
    values, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        RahConfig.from_keys(values).layer_indices(5)
    RahConfig(w_v=0, w_o=0, rho=1)  # both may be zero if rho ignores them


# -- the command and its overrides, as in all commands that read a recipe ---------------------------------------------


def test_overrides_are_distinguished_from_option_values_and_existing_paths(monkeypatch, tmp_path):
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(commands, "score_checkpoint", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    Path("run_lr=1e-4").mkdir()
    Path("r.yaml").touch()
    main(["score", "hera_m=2", "run_lr=1e-4", "--recipe", "r.yaml", "hera_k=3", "--output", "scores_k=3.json"])
    assert calls == [("run_lr=1e-4", "r.yaml", "scores_k=3.json", ["hera_m=2", "hera_k=3"])]


@pytest.mark.parametrize("given, used", [("3,1", "3"), (None, "0"), ("", "")])
def test_a_calibration_uses_one_device(monkeypatch, tmp_path, given, used):
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    monkeypatch.setattr(os, "environ", environment)
    (tmp_path / "empty.yaml").touch()
    assert main(["calibrate", str(tmp_path / "empty.yaml")]) == 2
    assert environment["CUDA_VISIBLE_DEVICES"] == used


# -- samples ---------------------------------------------------------------------------------------------------------

CONFIG = RahConfig(samples=12, held_out=4, probes=5)
IMAGES = [[image] for image in noise_images(20)]


def test_samples_without_an_image_or_with_a_repeated_one_are_skipped(caplog):
    profiled, held_out = draw_samples(rows_of([*[[]] * 9, *IMAGES[:11], *IMAGES[:11]]), CONFIG)
    assert len({sample.image.tobytes() for sample in (*profiled, *held_out)}) == 11
    assert "rah_samples: only 11 of 12 samples can be drawn (9 have no image" in caplog.text
    with pytest.raises(ValueError, match=r"dataset: only 8 of its 20.*12 have no image.*need 9.*`images`"):
        draw_samples(rows_of([*[[]] * 12, *IMAGES[:8]]), CONFIG)


@pytest.mark.parametrize("ids", [[3, 4], [IMAGE] * 4])
def test_a_sample_without_image_tokens_or_text_tokens_is_refused(ids):
    forward, (samples, _) = Forward(calibration_model()), draw_samples(rows_of(IMAGES), CONFIG)
    check_tokens(forward, samples)
    samples[2].features["input_ids"] = ids
    with pytest.raises(ValueError, match=rf"dataset: sample {samples[2].row} .*no image token or no text token"):
        check_tokens(forward, samples)
