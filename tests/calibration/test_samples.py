"""The draw of samples."""

import pytest

from llamafactory_hera.calibration.run import check_tokens, draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.selection.passes import Forward
from tests.calibration.tiny import IMAGE, Rows, calibration_model, noise_images

CONFIG = RahConfig(samples=12, held_out=4, probes=5)
IMAGES = [[image] for image in noise_images(20)]


def test_the_seed_decides_the_draw_and_no_image_is_in_both_parts() -> None:
    drawn = [draw_samples(Rows(IMAGES), RahConfig(samples=12, held_out=4, probes=5, seed=seed)) for seed in (0, 0, 1)]
    rows = [[sample.row for part in samples for sample in part] for samples in drawn]
    assert rows[0] == rows[1] != rows[2]
    assert tuple(map(len, drawn[0])) == (8, 4)
    assert len({sample.key for part in drawn[0] for sample in part}) == 12


def test_samples_without_an_image_or_with_one_that_was_drawn_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    profiled, held_out = draw_samples(Rows([*[[]] * 9, *IMAGES[:11], *IMAGES[:11]]), CONFIG)
    assert len({sample.image.tobytes() for sample in (*profiled, *held_out)}) == 11
    assert "rah_samples: only 11 of 12 samples can be drawn (9 have no image" in caplog.text
    with pytest.raises(ValueError, match=r"dataset: only 8 of its 20.*12 have no image.*need 9.*`images`"):
        draw_samples(Rows([*[[]] * 12, *IMAGES[:8]]), CONFIG)


@pytest.mark.parametrize("ids", [[3, 4], [IMAGE] * 4])
def test_a_sample_without_one_kind_of_token_is_named(ids: list[int]) -> None:
    forward, (samples, _) = Forward(calibration_model()), draw_samples(Rows(IMAGES), CONFIG)
    check_tokens(forward, samples)
    samples[2].features["input_ids"] = ids
    with pytest.raises(ValueError, match=rf"dataset: sample {samples[2].row} .*no image token or no text token"):
        check_tokens(forward, samples)
