import pytest
import torch
from PIL import Image

from llamafactory_hera.selection.passes import fill_cache
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import image_key


@pytest.fixture
def teacher(save_teacher):
    return CountingTeacher.from_pretrained(str(save_teacher("dinov2")), "cpu")


@pytest.fixture
def cache(tmp_path, teacher):
    return FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)


@pytest.fixture
def paths(tmp_path, make_images):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(make_images(7)):
        image.save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(7)]


class CountingTeacher(VisionTeacher):
    batches = ()

    def encode(self, pixel_values):
        self.batches = (*self.batches, len(pixel_values))
        return super().encode(pixel_values)


def by_key(images):
    return {image_key(image): image for image in images}


def encode_images(teacher, cache, images):
    """The features that `fill_cache` has written, read back for each image."""
    fill_cache(teacher, cache, by_key(images), batch_size=32)
    return torch.stack(cache.get(list(map(image_key, images)))).float()


def direct(teacher, paths):
    pixels = teacher.processor.batch([Image.open(path) for path in paths])
    return VisionTeacher.encode(teacher, pixels).half().float()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_computed_in_order_rounded_and_the_same_in_a_repetition(num_workers, teacher, cache, paths):
    fill_cache(teacher, cache, by_key(paths), batch_size=3, num_workers=num_workers)
    assert teacher.batches == (3, 3, 1)
    features = encode_images(teacher, cache, paths)
    torch.testing.assert_close(features, direct(teacher, paths), rtol=1e-3, atol=1e-3)
    assert torch.equal(encode_images(teacher, cache, paths), features)
    assert torch.equal(features, features.half().float())


def test_nothing_is_computed_twice(teacher, cache, paths, tmp_path):
    with open(paths[0], "rb") as file:
        content = file.read()
    images = [paths[0], paths[1], {"path": None, "bytes": content}, content, paths[1]]
    first = encode_images(teacher, cache, images)
    assert teacher.batches == (2,)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[4])
    assert not torch.equal(first[0], first[1])
    assert encode_images(teacher, cache, paths).shape == (7, teacher.dim)
    again = FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)
    assert torch.equal(encode_images(teacher, again, images), first)
    assert teacher.batches == (2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_and_the_features_before_it_are_kept(num_workers, teacher, cache, paths, tmp_path):
    with open(paths[5], "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match=r"5\.png"):
        fill_cache(teacher, cache, by_key(paths), batch_size=2, num_workers=num_workers)
    assert len(FeatureCache(tmp_path / "features", teacher.fingerprint, teacher.dim)) == 4
