"""The draw that selection and calibration share; what each makes of it is tested with them."""

import pytest
from PIL import Image

from llamafactory_hera.selection.draw import draw, sample_image


class Pairs:
    """Two images a row, one of them shared by all rows."""

    def __init__(self, n):
        self.shared = Image.new("RGB", (4, 4), "white")
        self.own = [Image.new("RGB", (4, 4), (row, 0, 0)) for row in range(n)]

    def __len__(self):
        return len(self.own)

    def images(self, row):
        return [self.shared, self.own[row]]

    def encode(self, row):
        return {"input_ids": [row]}


@pytest.mark.parametrize(("index", "taken"), [(0, "a"), (1, "b"), (-1, "c"), (9, "c"), (-9, "a")])
def test_which_of_several_images(index, taken):
    assert sample_image(["a", "b", "c"], index) == taken


def test_the_image_that_stands_for_a_sample_decides_what_is_a_repetition():
    source = Pairs(6)
    assert len(draw(source, 6, seed=0).samples) == 1
    found = draw(source, 6, seed=0, image_index=-1)
    assert sorted(sample.row for sample in found.samples) == list(range(6))
    assert all(sample.image is source.own[sample.row] for sample in found.samples)


def test_rows_are_counted_until_there_are_enough():
    source = Pairs(10)
    found = draw(source, 3, seed=0, image_index=1, usable=lambda features: features["input_ids"][0] % 2 == 0)
    assert len(found.samples) == 3
    assert all(sample.row % 2 == 0 for sample in found.samples)
    assert found.rows == 10
    assert found.without_text <= 5
    everything = draw(source, 10, seed=0, image_index=1, usable=lambda features: False)
    assert (everything.samples, everything.without_text, everything.without_image) == ([], 10, 0)
