import random
import sys
from itertools import product

import pytest

from llamafactory_hera.demo.photos import DIGIT_SIDE, PHOTO_SIDE, REGIONS, digits, photographs


def test_held_out_regions_share_no_pixel_with_training_regions():
    train = [region for region in REGIONS if region.split == "train"]
    held_out = [region for region in REGIONS if region.split == "held_out"]
    assert len(held_out) >= 5
    for a, b in product(train, held_out):
        apart = a.box[2] < b.box[0] or b.box[2] < a.box[0] or a.box[3] < b.box[1] or b.box[3] < a.box[1]
        assert a.source != b.source or apart


def test_photographs_show_every_region_in_turn():
    regions = [region for region in REGIONS if region.split == "train"]
    made = photographs(len(regions) + 1, random.Random(0), "train")
    assert [item.subject for item in made] == [region.subject for region in [*regions, regions[0]]]
    assert {item.image.size for item in made} == {(PHOTO_SIDE, PHOTO_SIDE)}
    assert {item.image.mode for item in made} == {"RGB"}
    assert made[0].image.tobytes() != made[-1].image.tobytes()  # another crop of the same region


def test_digits_of_the_splits_are_different_samples_with_their_own_label():
    from sklearn.datasets import load_digits

    made = digits(60, 30, random.Random(0))
    pixels = {split: {item.image.tobytes() for item in items} for split, items in made.items()}
    assert [len(items) for items in made.values()] == [60, 30]
    assert not pixels["train"] & pixels["held_out"]
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    targets = load_digits().target[random.Random(0).sample(range(1797), 90)]
    assert [item.questions[0][1] for item in made["train"]] == [words[target] for target in targets[:60]]
    assert made["train"][0].image.size == (DIGIT_SIDE, DIGIT_SIDE)


def test_yes_no_questions_about_real_images_are_answered_by_what_they_show():
    items = photographs(60, random.Random(1), "train") + digits(60, 0, random.Random(1))["train"]
    answers = []
    for item in items:
        text, answer = item.questions[1]
        named = text.removesuffix("?").removeprefix("Is this a picture of ").removeprefix("Is this the ")
        assert (answer == "yes") == (named == item.subject)
        answers.append(answer)
    assert 40 < answers.count("yes") < 80


@pytest.mark.parametrize("package", ["skimage", "sklearn"])
def test_a_missing_package_names_the_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "llamafactory-hera\[demo\]"'):
        photographs(1, random.Random(0), "train")
