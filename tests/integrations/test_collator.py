"""The teacher's view of a batch, beside what the host collates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from llamafactory_hera.integrations.llamafactory.collator import CACHED, NO_IMAGE, PIXELS, HeraCollator
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import image_key


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> VisionTeacher:
    folder = tmp_path_factory.mktemp("teacher")
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    BitImageProcessor(size=size, do_center_crop=False, do_resize=True).save_pretrained(folder)
    return VisionTeacher.from_pretrained(str(folder), device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for index, colour in enumerate(("red", "green", "blue")):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (20, 12), colour).save(path)
        paths.append(str(path))
    return paths


def _host(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    # as the host's collator does: the images are gone afterwards
    for feature in features:
        feature.pop("images", None)
    return {"input_ids": torch.zeros(len(features), 3, dtype=torch.long)}


def test_the_teacher_sees_the_first_image_of_each_sample(teacher: VisionTeacher, images: list[str]) -> None:
    collate = HeraCollator(_host, teacher.processor)
    batch = collate([{"images": [images[0], images[1]]}, {"images": []}, {"images": [images[2]]}, {}])
    assert batch["hera_source"].tolist() == [PIXELS, NO_IMAGE, PIXELS, NO_IMAGE]
    expected = teacher.processor.batch([Image.open(images[0]), Image.open(images[2])])
    assert torch.equal(batch["hera_pixels"][[0, 2]], expected)
    assert not batch["hera_pixels"][[1, 3]].any()
    assert batch["input_ids"].shape == (4, 3)


@pytest.mark.parametrize(("index", "shown"), [(1, 1), (-1, 2), (9, 2), (-9, 0)])
def test_another_image_can_be_the_sample_s(teacher: VisionTeacher, images: list[str], index: int, shown: int) -> None:
    batch = HeraCollator(_host, teacher.processor, image_index=index)([{"images": images}])
    assert torch.equal(batch["hera_pixels"], teacher.processor.batch([Image.open(images[shown])]))


def test_a_batch_without_images_gives_the_teacher_nothing(teacher: VisionTeacher) -> None:
    batch = HeraCollator(_host, teacher.processor)([{"images": None}, {"videos": ["a.mp4"]}])
    assert {name for name in batch if name.startswith("hera_")} == {"hera_source"}
    assert not batch["hera_source"].any()


def test_cached_images_are_not_decoded(teacher: VisionTeacher, images: list[str], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", teacher.fingerprint, teacher.dim)
    feature = torch.randn(1, teacher.dim).half().float()
    cache.put([image_key(images[1])], feature)
    batch = HeraCollator(_host, teacher.processor, cache)([{"images": [i]} for i in images] + [{}])
    assert batch["hera_source"].tolist() == [PIXELS, CACHED, PIXELS, NO_IMAGE]
    assert torch.equal(batch["hera_features"][1], feature[0])
    assert not batch["hera_pixels"][1].any()
    keys = [bytes(key.tolist()) for key in batch["hera_keys"][:3]]
    assert keys == [image_key(image) for image in images]


def test_every_tensor_has_the_batch_as_first_axis(teacher: VisionTeacher, images: list[str], tmp_path: Path) -> None:
    # streaming datasets are split over processes along it
    cache = FeatureCache(tmp_path / "cache", teacher.fingerprint, teacher.dim)
    batch = HeraCollator(_host, teacher.processor, cache)([{}, {"images": images[:1]}, {}])
    assert {tensor.shape[0] for tensor in batch.values()} == {3}


def test_a_broken_image_is_named(teacher: VisionTeacher, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        HeraCollator(_host, teacher.processor)([{"images": [str(path)]}])


@pytest.mark.parametrize("index, expected", [(0, 0), (1, 1), (-1, 2), (9, 2), (-9, 0)])
def test_it_says_which_image_of_how_many_the_teacher_sees(
    teacher: VisionTeacher, images: list[str], index: int, expected: int
) -> None:
    collate = HeraCollator(_host, teacher.processor, image_index=index, names_image=True)
    batch = collate([{"images": images}, {}, {"images": images[:1]}])
    assert batch["hera_image"].tolist() == [[expected, 3], [0, 0], [0, 1]]
    assert torch.equal(batch["hera_pixels"][0], teacher.processor.batch([Image.open(images[expected])])[0])
