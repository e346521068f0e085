"""The teacher's inputs, which HeRA's collator adds to the batch of the loop's collator."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import image_key
from llamafactory_hera.training.collator import CACHED, NO_IMAGE, PIXELS, HeraCollator
from tests.tiny_models import image_files, teacher_folder


@pytest.fixture(scope="module")
def teacher() -> VisionTeacher:
    return VisionTeacher.from_pretrained(teacher_folder(), device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    return image_files(tmp_path, 3, (20, 12))


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    # some collators remove the images from the rows
    for row in rows:
        row.pop("images", None)
    return {"input_ids": torch.zeros(len(rows), 3, dtype=torch.long)}


def test_the_teacher_sees_the_first_image_of_each_sample(teacher, images):
    batch = HeraCollator(_collate, teacher.processor)(
        [{"images": [images[0], images[1]]}, {"images": []}, {"images": [images[2]]}, {}]
    )
    assert batch["hera_source"].tolist() == [PIXELS, NO_IMAGE, PIXELS, NO_IMAGE]
    expected = teacher.processor.batch([Image.open(images[0]), Image.open(images[2])])
    assert torch.equal(batch["hera_pixels"][[0, 2]], expected)
    assert not batch["hera_pixels"][[1, 3]].any()
    assert batch["input_ids"].shape == (4, 3)


@pytest.mark.parametrize("index, selected", [(1, 1), (-1, 2)])
def test_image_index_selects_an_image_and_the_batch_contains_its_index_and_the_number_of_images(
    teacher, images, index, selected
):
    def rows() -> list[dict[str, Any]]:
        return [{"images": images}, {}, {"images": images[:1]}]

    without_teacher = HeraCollator(_collate, None, image_index=index)(rows())
    assert without_teacher["hera_image"].tolist() == [[selected, 3], [0, 0], [0, 1]]
    assert "hera_pixels" not in without_teacher
    batch = HeraCollator(_collate, teacher.processor, image_index=index)(rows())
    assert torch.equal(batch["hera_pixels"][0], teacher.processor.batch([Image.open(images[selected])])[0])


def test_a_batch_without_images_gives_the_teacher_nothing(teacher):
    batch = HeraCollator(_collate, teacher.processor)([{"images": None}, {"videos": ["a.mp4"]}])
    assert {name for name in batch if name.startswith("hera_")} == {"hera_source", "hera_keys"}
    assert not batch["hera_source"].any()
    assert not batch["hera_keys"].any()


def test_a_collator_that_sorts_its_rows_is_refused(teacher):
    def by_length(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        mask = [torch.ones_like(row) for row in tokens]
        return {"input_ids": pad_sequence(tokens, True), "attention_mask": pad_sequence(mask, True)}

    collator = HeraCollator(by_length, teacher.processor)
    collator([{"input_ids": [5, 6, 2]}, {"input_ids": [5, 2]}])  # the rows keep their order
    for make in (list, np.array):
        with pytest.raises(ValueError, match=r"^data_collator: it moves sample 0 of a batch to position 1; keep"):
            collator([{"input_ids": make([5, 2])}, {"input_ids": make([5, 6, 2])}])


def test_a_row_need_not_be_a_mapping(teacher, images):
    collator = HeraCollator(lambda rows: {"input_ids": torch.tensor([ids for ids, _ in rows])}, teacher.processor)
    collator.images_of, collator.drop = lambda row: [row[1]], ("images",)
    assert collator([([5, 2], image) for image in images])["hera_source"].tolist() == [PIXELS] * 3


def test_cached_images_are_not_decoded(teacher, images, tmp_path):
    cache = FeatureCache(tmp_path / "cache", teacher.fingerprint, teacher.dim)
    feature = torch.randn(1, teacher.dim).half().float()
    cache.put([image_key(images[1])], feature)
    batch = HeraCollator(_collate, teacher.processor, cache)([{"images": [i]} for i in images] + [{}])
    assert batch["hera_source"].tolist() == [PIXELS, CACHED, PIXELS, NO_IMAGE]
    assert torch.equal(batch["hera_features"][1].view(torch.float16).float(), feature[0])
    assert not batch["hera_pixels"][1].any()
    keys = [bytes(key.tolist()) for key in batch["hera_keys"][:3]]
    assert keys == [image_key(image) for image in images]
    # accelerate splits the batches of a stream along the first axis
    assert {tensor.shape[0] for name, tensor in batch.items() if name != "hera_rows"} == {4}
    assert batch["hera_rows"].tolist() == [0, 2]
