import json
import pickle

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from llamafactory_hera.teachers.processor import TeacherProcessor


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit", "clip", "siglip"])
def test_it_gives_what_the_models_own_processor_gives(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    processor = TeacherProcessor.from_pretrained(str(folder))
    images = make_images(2) + make_images(1, size=(70, 30), seed=1)
    own = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = torch.cat([own(images=image, return_tensors="pt")["pixel_values"] for image in images])
    assert torch.equal(processor.batch(images), expected)
    assert processor.pixel_size == (32, 32)
    assert processor(images[2]).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_any_mode_are_taken_as_rgb(mode, save_teacher, make_images):
    processor = TeacherProcessor.from_pretrained(str(save_teacher("vit")))
    image = make_images(1)[0].convert(mode)
    assert torch.equal(processor(image), processor(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["dinov2", "siglip2"])
def test_it_works_after_pickling_and_in_loader_workers(kind, save_teacher, make_images):
    processor = TeacherProcessor.from_pretrained(str(save_teacher(kind)))
    images = make_images(4)
    expected = processor.batch(images)
    assert torch.equal(pickle.loads(pickle.dumps(processor)).batch(images), expected)
    loader = DataLoader(images, batch_size=2, num_workers=2, collate_fn=processor.batch)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_it_loads_no_weights(save_teacher, make_images, monkeypatch):
    folder = save_teacher("dinov2")

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    TeacherProcessor.from_pretrained(str(folder))(make_images(1)[0])


def test_the_processor_inside_a_text_and_image_processor_is_found(save_teacher, make_images):
    folder = save_teacher("siglip")
    expected = TeacherProcessor.from_pretrained(str(folder)).batch(make_images(2))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(TeacherProcessor.from_pretrained(str(folder)).batch(make_images(2)), expected)


def test_a_processor_that_gives_different_sizes_is_refused(save_teacher, edit_json):
    folder = save_teacher("dinov2")
    edit_json(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(ValueError, match=r"my_key: .*dinov2.*different sizes.*do_center_crop"):
        TeacherProcessor.from_pretrained(str(folder), key="my_key")


def test_naflex_pixels_are_those_of_the_own_processor_for_an_image_of_the_grids_size(save_teacher, make_images):
    folder = save_teacher("siglip2")
    image = make_images(1, size=(32, 32))[0]
    own = transformers.AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    pixels = TeacherProcessor.from_pretrained(str(folder))(image)
    # patch 5 of the 4 x 4 grid is the second of the second row
    patch = own["pixel_values"][0, 5].reshape(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels[:, 8:16, 8:16], patch)
    assert pixels.shape == (3, 32, 32)
