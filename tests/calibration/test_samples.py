"""The draw of samples."""

from collections.abc import Container

import pytest

from llamafactory_hera.calibration.samples import draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from tests.calibration.tiny import Rows, noise_images

CONFIG = RahConfig(samples=12, held_out=4, probes=5)


def source(without_image: Container[int] = ()) -> Rows:
    return Rows([[] if row in without_image else [image] for row, image in enumerate(noise_images(20))])


def test_the_seed_decides_the_draw_and_no_image_is_in_both_parts() -> None:
    drawn = [draw_samples(source(), RahConfig(samples=12, held_out=4, probes=5, seed=seed)) for seed in (0, 0, 1)]
    rows = [[sample.row for part in samples for sample in part] for samples in drawn]
    assert rows[0] == rows[1] != rows[2]
    assert tuple(map(len, drawn[0])) == (8, 4)
    assert len({sample.key for part in drawn[0] for sample in part}) == 12


def test_an_image_is_drawn_once() -> None:
    images = noise_images(9)
    assert sum(map(len, draw_samples(Rows([[image] for image in (*images, *images)]), CONFIG))) == 9


def test_samples_without_an_image_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw_samples(source(range(9)), CONFIG)
    assert all(sample.images for part in drawn for sample in part)
    assert "rah_samples: only 11 of 12 samples can be drawn (9 have no image" in caplog.text


def test_too_few_samples_with_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset: only 8 of its 20.*12 have no image.*rah_probes: 5.*`images`"):
        draw_samples(source(range(12)), CONFIG)
