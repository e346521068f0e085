import io
import shutil

import numpy as np
import pytest
from PIL import Image

from llamafactory_hera.teachers.images import image_key, load_image


@pytest.fixture
def picture(tmp_path, make_images):
    path = tmp_path / "picture.png"
    make_images(1)[0].save(path)
    return path


def forms(path):
    content = path.read_bytes()
    return {
        "str": str(path),
        "path": path,
        "bytes": content,
        "dict with path": {"path": str(path), "bytes": None},
        "dict with bytes": {"path": None, "bytes": content},
        "dict with both": {"path": "not/there.png", "bytes": content},
        "file object": io.BytesIO(content),
    }


def test_every_form_gives_the_same_pixels_and_the_same_key(picture):
    with Image.open(picture) as opened:
        expected = np.array(opened)
    wrong = [name for name, form in forms(picture).items() if not np.array_equal(np.array(load_image(form)), expected)]
    assert not wrong
    assert {image_key(form) for form in forms(picture).values()} == {image_key(picture)}
    assert len(image_key(picture)) == 16


def test_a_copy_under_another_name_has_the_same_key_and_another_image_another(picture, tmp_path, make_images):
    copy = tmp_path / "other" / "name.jpg"
    copy.parent.mkdir()
    shutil.copy(picture, copy)
    assert image_key(copy) == image_key(picture)
    different = tmp_path / "different.png"
    make_images(2)[1].save(different)
    assert image_key(different) != image_key(picture)


def test_a_file_object_is_read_from_its_start_and_left_where_it_was(picture):
    file = io.BytesIO(picture.read_bytes())
    file.seek(7)
    assert image_key(file) == image_key(picture)
    load_image(file)
    assert file.tell() == 7


def test_pil_images_have_the_key_of_their_rgb_pixels_and_size(make_images):
    image = make_images(1)[0]
    assert image_key(image) == image_key(image.copy())
    assert image_key(image) == image_key(image.convert("RGBA"))
    turned = Image.frombytes("RGB", image.size[::-1], image.tobytes())
    assert image_key(turned) != image_key(image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_colour_modes_become_rgb(mode, tmp_path, make_images):
    image = make_images(1)[0].convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    assert load_image(buffer.getvalue()).mode == "RGB"


def test_a_missing_file_is_named(tmp_path):
    for call in (load_image, image_key):
        for image in (str(tmp_path / "gone.png"), {"path": str(tmp_path / "gone.png"), "bytes": None}):
            with pytest.raises(ValueError, match=r"gone\.png.*No such file.*media_dir"):
                call(image)


@pytest.mark.parametrize("damage", ["cut", "not an image", "empty"])
def test_a_corrupt_file_is_named(damage, picture):
    content = picture.read_bytes()
    picture.write_bytes({"cut": content[: len(content) // 2], "not an image": b"hello", "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"picture\.png.*corrupt or not an image"):
        load_image(picture)
    with pytest.raises(ValueError, match=r"picture\.png.*corrupt or not an image"):
        load_image({"path": str(picture), "bytes": picture.read_bytes()})


def test_what_is_no_image_at_all_is_refused_by_its_type():
    with pytest.raises(ValueError, match="given as int"):
        load_image(3)
    with pytest.raises(ValueError, match="without 'bytes' and without 'path'"):
        load_image({"path": None, "bytes": None})
