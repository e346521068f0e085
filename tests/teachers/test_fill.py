"""A teacher fills a feature cache."""

import pytest
import torch
from PIL import Image

from llamafactory_hera.selection.passes import fill_cache
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import image_key
from tests.tiny_models import image_files


class CountingTeacher(VisionTeacher):
    batches = ()

    def encode(self, pixel_values):
        self.batches = (*self.batches, len(pixel_values))
        return super().encode(pixel_values)


@pytest.fixture
def teacher(save_teacher):
    return CountingTeacher.from_pretrained(str(save_teacher("dinov2")), "cpu")


@pytest.fixture
def cache(tmp_path, teacher):
    return FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)


@pytest.fixture
def paths(tmp_path):
    return image_files(tmp_path, 7)


def fill(teacher, cache, images, **options):
    fill_cache(teacher, cache, {image_key(image): image for image in images}, **{"batch_size": 32} | options)
    return torch.stack(cache.get(list(map(image_key, images))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_computed_in_batches_and_rounded(num_workers, teacher, cache, paths):
    features = fill(teacher, cache, paths, batch_size=3, num_workers=num_workers)
    assert teacher.batches == (3, 3, 1)
    expected = VisionTeacher.encode(teacher, teacher.processor.batch([Image.open(path) for path in paths]))
    torch.testing.assert_close(features, expected.half(), rtol=1e-3, atol=1e-3)


def test_nothing_is_computed_twice(teacher, cache, paths, tmp_path):
    with open(paths[0], "rb") as file:
        content = file.read()
    images = [paths[0], paths[1], {"path": None, "bytes": content}, content, paths[1]]
    first = fill(teacher, cache, images)
    assert teacher.batches == (2,)
    assert [torch.equal(first[0], other) for other in first] == [True, False, True, True, False]
    fill(teacher, cache, paths)
    again = FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)
    assert torch.equal(fill(teacher, again, images), first)
    assert teacher.batches == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_and_the_features_before_it_are_kept(num_workers, teacher, cache, paths, tmp_path):
    with open(paths[5], "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match=r"5\.png"):
        fill(teacher, cache, paths, batch_size=2, num_workers=num_workers)
    assert len(FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)) == 4
