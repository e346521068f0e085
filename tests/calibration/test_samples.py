"""The draw of samples, and the corruption of controls."""

import numpy as np
import pytest

from llamafactory_hera.calibration.samples import corrupt, draw_samples
from llamafactory_hera.calibration.settings import RahConfig
from tests.calibration.tiny import Rows, noise_images

CONFIG = RahConfig(samples=12, held_out=4, probes=5)


def source(n: int = 20, empty: tuple[int, ...] = ()) -> Rows:
    images = noise_images(n)
    return Rows([[] if row in empty else [images[row]] for row in range(n)])


def test_the_seed_decides_the_draw_and_no_image_is_in_both_parts() -> None:
    rows = source()
    drawn = [draw_samples(rows, RahConfig(samples=12, held_out=4, probes=5, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0].digest() == drawn[1].digest() != drawn[2].digest()
    assert (len(drawn[0].profiled), len(drawn[0].held_out)) == (8, 4)
    keys = [sample.key for sample in (*drawn[0].profiled, *drawn[0].held_out)]
    assert len(set(keys)) == 12


def test_a_further_sample_of_an_image_is_passed_over() -> None:
    images = noise_images(9)
    drawn = draw_samples(Rows([[image] for image in (*images, *images)]), CONFIG)
    assert len(drawn.profiled) + len(drawn.held_out) == 9


def test_samples_without_an_image_are_passed_over_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    drawn = draw_samples(source(20, empty=tuple(range(9))), CONFIG)
    assert all(sample.images for sample in (*drawn.profiled, *drawn.held_out))
    assert drawn.without_image == 9
    assert "rah_samples: 12 are asked for, and 11 are there (9 have no image" in caplog.text


@pytest.mark.parametrize(
    "empty, message",
    [
        (20, r"dataset: 0 of its 20.*20 have no image.*`images` column"),
        (12, r"dataset: 8 of its 20.*rah_probes: 5.*rah_held_out: 4.*12 have no image"),
    ],
)
def test_too_few_samples_with_an_image_are_refused(empty: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_samples(source(20, empty=tuple(range(empty))), CONFIG)


def pixels(sample) -> bytes:
    (image,) = sample.features["images"]
    return np.asarray(image).tobytes()


def test_shuffled_gives_every_sample_anothers_image_within_its_part() -> None:
    rows = source()
    drawn = draw_samples(rows, CONFIG)
    shuffled = corrupt(drawn, rows, "shuffled", seed=0)
    for ours, theirs in ((drawn.profiled, shuffled.profiled), (drawn.held_out, shuffled.held_out)):
        assert [sample.row for sample in ours] == [sample.row for sample in theirs]
        assert all(pixels(a) != pixels(b) for a, b in zip(ours, theirs, strict=True))
        assert sorted(map(pixels, ours)) == sorted(map(pixels, theirs))
        assert [a.features["input_ids"] for a in ours] == [b.features["input_ids"] for b in theirs]
    assert shuffled.digest() != drawn.digest()
    assert corrupt(drawn, rows, "shuffled", seed=0).digest() == shuffled.digest()


def test_images_are_exchanged_between_samples_with_as_many(caplog: pytest.LogCaptureFixture) -> None:
    images = noise_images(30)
    rows = Rows([[images[row]] if row % 2 else [images[row], images[29 - row]] for row in range(14)])
    drawn = draw_samples(rows, CONFIG)
    shuffled = corrupt(drawn, rows, "shuffled", seed=0)
    for ours, theirs in zip(drawn.profiled, shuffled.profiled, strict=True):
        assert len(ours.images) == len(theirs.images)
    rows = Rows([[images[row]] for row in range(13)] + [[images[13], images[14]]])
    every = RahConfig(samples=14, held_out=4, probes=4)
    corrupt(draw_samples(rows, every), rows, "shuffled", seed=0)
    assert "--control: 1 of " in caplog.text
    numbers = RahConfig(samples=2, held_out=1, probes=1)
    rows = Rows([[images[row]] if row % 2 else [images[row], images[29 - row]] for row in range(14)])
    with pytest.raises(ValueError, match=r"--control.*blank"):
        corrupt(draw_samples(rows, numbers), rows, "shuffled", seed=0)


def test_blank_images_are_white_and_of_the_same_size() -> None:
    rows = source()
    drawn = draw_samples(rows, CONFIG)
    for ours, theirs in zip(drawn.profiled, corrupt(drawn, rows, "blank", seed=0).profiled, strict=True):
        assert set(pixels(theirs)) == {255}
        assert theirs.images[0].size == ours.images[0].size
