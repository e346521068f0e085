"""Which samples are drawn."""

import logging

import pytest

from llamafactory_hera.selection.samples import draw_samples, samples_digest
from llamafactory_hera.selection.settings import SelectSettings

from .tiny import Rows, captions, noise_images


def rows(n=30, **replaced):
    images = [[image] for image in noise_images(n)]
    return Rows(images, captions(n)), images


def settings(**changes):
    return SelectSettings(**{"samples": 20, "k": 3, **changes})


def test_the_draw_depends_on_the_seed_alone():
    source, _ = rows()
    first = draw_samples(source, settings(seed=1))
    assert len(first) == 20
    assert samples_digest(first) == samples_digest(draw_samples(source, settings(seed=1)))
    assert samples_digest(first) != samples_digest(draw_samples(source, settings(seed=2)))


def test_a_smaller_draw_is_the_beginning_of_a_larger_one():
    source, _ = rows()
    assert [s.key for s in draw_samples(source, settings(samples=7))] == [
        s.key for s in draw_samples(source, settings())
    ][:7]


def test_each_image_is_drawn_once():
    _, images = rows(12)
    source = Rows(images * 3, captions(36))
    drawn = draw_samples(source, settings(samples=36))
    assert len(drawn) == len({sample.key for sample in drawn}) == 12


def test_samples_without_image_or_tokens_are_passed_over(caplog):
    _, images = rows()
    features = captions(30)
    images[3] = []
    features[5] = None
    features[7]["labels"] = [-100] * len(features[7]["labels"])
    with caplog.at_level(logging.WARNING):
        drawn = draw_samples(Rows(images, features), settings(samples=30))
    assert len(drawn) == 27
    assert "2 samples leave no token" in caplog.text
    assert "hera_select_samples: 30" in caplog.text


def test_other_poolings_need_no_labels():
    _, images = rows()
    features = [feature | {"labels": [-100] * len(feature["labels"])} for feature in captions(30)]
    assert len(draw_samples(Rows(images, features), settings(pooling="text"))) == 20


def test_fewer_than_k_plus_2_names_both_numbers():
    _, images = rows()
    images = images[:4] + [[]] * 26
    with pytest.raises(ValueError, match=r"dataset: 4 of its 30 .* hera_select_k: 3 needs 5 .*26 have no image"):
        draw_samples(Rows(images, captions(30)), settings())


@pytest.mark.parametrize("feature", [None, {"input_ids": [5], "labels": [-100], "attention_mask": [1]}])
def test_a_dataset_without_captions_says_so(feature):
    _, images = rows()
    with pytest.raises(ValueError, match="dataset: none of its 30 samples with an image has a caption"):
        draw_samples(Rows(images, [feature] * 30), settings())


def test_an_unreadable_image_is_named(tmp_path):
    _, images = rows()
    images[0] = [str(tmp_path / "gone.png")]
    with pytest.raises(ValueError, match=r"gone\.png"):
        draw_samples(Rows(images, captions(30)), settings(samples=30))


@pytest.mark.parametrize(("n_samples", "warns"), [(12, True), (20, False)])
def test_a_draw_on_which_chance_decides_is_warned_of(caplog, n_samples, warns):
    source, _ = rows()
    with caplog.at_level(logging.WARNING):
        draw_samples(source, settings(samples=n_samples))
    assert ("mostly noise" in caplog.text) == warns
