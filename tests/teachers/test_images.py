import base64
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from llamafactory_hera.teachers.images import (
    chosen_image,
    decoded_key,
    image_key,
    load_image,
    sample_images,
    undecoded,
)
from tests.tiny_models import image_files

from .conftest import make_images


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    make_images(1)[0].save(path)
    return path


# the images of a sample

TEXT = {"type": "text", "text": "What is this?", "image": None}


def user(*content):
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"images": ["a.png", "b.png"]}, ["a.png", "b.png"]),
        ({"images": [None, "b.png"]}, ["b.png"]),
        ({"image": "a.png"}, ["a.png"]),
        ({"images": [], "image": "a.png"}, ["a.png"]),
        ({"images": None, "messages": user({"type": "image", "image": "a.png"}, TEXT)}, ["a.png"]),
        # The column contains the image to which the placeholder in the message refers.
        ({"images": ["a.png"], "messages": user({"type": "image"}, TEXT)}, ["a.png"]),
        ({"messages": user({"type": "image"}, TEXT)}, []),
        (
            {"messages": user(*({"type": "image", key: f"{key}.png"} for key in ("path", "url")))},
            ["path.png", "url.png"],
        ),
        ({"messages": user({"type": "image_url", "image_url": {"url": "a.png"}})}, ["a.png"]),
        ({"messages": user({"type": "image", "image": {"bytes": b"x"}})}, [{"bytes": b"x"}]),
        (
            {name: user({"type": "image", "image": name}) for name in ("prompt", "completion")},
            ["prompt", "completion"],
        ),
        ({"prompt": "What is this?", "completion": "A cat."}, []),
        ({"messages": [{"role": "user", "content": "no image"}]}, []),
    ],
)
def test_the_images_of_a_row_are_found_in_columns_and_messages(row, images):
    assert sample_images(row) == images


@pytest.mark.parametrize(
    ("count", "index", "chosen"),
    [(3, 0, 0), (3, 2, 2), (3, 3, 2), (3, -1, 2), (3, -3, 0), (3, -9, 0), (1, 5, 0), (0, 0, 0), (0, -1, 0)],
)
def test_the_index_of_the_teachers_image_is_counted_from_either_end_and_clamped(count, index, chosen):
    assert chosen_image(count, index) == chosen


# pixels and keys


def test_every_form_gives_the_same_pixels_and_the_same_key(picture, tmp_path):
    content = picture.read_bytes()
    shutil.copy(picture, tmp_path / "name.jpg")
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    forms = [str(picture), picture, tmp_path / "name.jpg", content, uri, {"path": uri, "bytes": None}]
    forms += [
        {"path": path, "bytes": data} for path, data in ((str(picture), None), (None, content), ("gone", content))
    ]
    with Image.open(picture) as opened:
        expected = np.array(opened)
    for form in forms:
        assert np.array_equal(np.array(load_image(form)), expected), form
        assert image_key(form) == image_key(picture), form
    assert len(image_key(picture)) == 16
    make_images(2)[1].save(tmp_path / "different.png")
    assert image_key(tmp_path / "different.png") != image_key(picture)


def test_pil_images_have_the_key_of_their_rgb_pixels_and_size():
    image = make_images(1)[0]
    assert image_key(image) == image_key(image.copy()) == image_key(image.convert("RGBA"))
    turned = Image.frombytes("RGB", image.size[::-1], image.tobytes())
    assert image_key(turned) != image_key(image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_other_color_modes_become_rgb(mode):
    assert load_image(make_images(1)[0].convert(mode)).mode == "RGB"


@pytest.mark.parametrize(
    ("dtype", "white"), [("uint16", 65535), ("int32", 65535), ("int32", 255), ("float32", 1), ("float32", 255)]
)
def test_values_of_more_than_eight_bits_are_scaled(dtype, white):
    image = Image.fromarray(np.linspace(0, white, 256).reshape(16, 16).astype(dtype))
    assert np.abs(np.asarray(load_image(image))[..., 0].flatten() - np.arange(256.0)).max() <= 1


@pytest.mark.parametrize("content", [b"hello", b""])
def test_a_corrupt_file_is_named(content, picture):
    picture.write_bytes(content)
    for image in (picture, {"path": str(picture), "bytes": content}):
        with pytest.raises(ValueError, match=r"picture\.png.*corrupt or not an image"):
            load_image(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64,a", r"The image file 'data:image/png;base64,a' cannot be read \(.*base64"),
        ({"path": "data:image/png;base64," + "!" * 9999}, r"The image file 'data:image/png;base64,!{18}…' cannot be"),
        (
            {"path": "gone.png", "bytes": None},
            r"'gone\.png' cannot be read \(No such file.*Check the path in the data",
        ),
        ("x" * 9999, r"The image file 'x{40}…' cannot be read \(File name too long"),
        ("a\0b", "cannot be read .embedded null"),
        (3, "has the type int; give a path, bytes, a dict with"),
        ({"path": None, "bytes": None}, "has the type NoneType; give a path"),
        ("https://example.org/a.png", r"The image 'https://example.org/a.png' is a URL.*download it"),
    ],
)
def test_an_image_that_cannot_be_read_is_named(image, message):
    for call in (image_key, load_image):
        with pytest.raises(ValueError, match=message):
            call(image)


# the library `datasets`


def dataset_of(kind, paths):
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": image}
    features, rows = {
        "column": ({"image": image}, [{"image": path} for path in paths]),
        "list": ({"images": [image]}, [{"images": [path]} for path in paths]),
        "messages": (
            {"messages": [{"role": datasets.Value("string"), "content": [part]}]},
            [{"messages": user({"type": "image", "text": None, "image": path}, TEXT)[:1]} for path in paths],
        ),
    }[kind]
    features["row"] = datasets.Value("int64")
    rows = [row | {"row": number} for number, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


@pytest.fixture
def pictures(tmp_path):
    return image_files(tmp_path, 3)


@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
@pytest.mark.parametrize("kind", ["column", "list", "messages"])
def test_images_of_a_dataset_have_the_keys_of_their_files_and_decode_as_the_dataset_would(kind, streamed, pictures):
    dataset = dataset_of(kind, pictures)
    expected_rows = list(dataset)
    if streamed:
        dataset = dataset.to_iterable_dataset()
    view, decode = undecoded(dataset)
    rows = list(view)
    assert [image_key(sample_images(row)[0]) for row in rows] == list(map(image_key, pictures))
    decoded = [decode(row) for row in rows]
    assert [row.keys() for row in decoded] == [row.keys() for row in expected_rows]
    for row, other in zip(decoded, expected_rows, strict=True):
        (image,), (expected,) = sample_images(row), sample_images(other)
        assert isinstance(image, Image.Image)
        assert image.tobytes() == expected.tobytes()
    assert isinstance(sample_images(next(iter(dataset)))[0], Image.Image)  # the dataset did not change
    fewer = next(iter(view.remove_columns(["row"])))
    assert decode(fewer).keys() == fewer.keys()


def test_a_picture_that_the_library_rotates_does_not_have_the_key_of_its_file(pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = str(tmp_path / "turned.jpg")
    Image.open(pictures[0]).save(turned, exif=exif)
    view, decode = undecoded(dataset_of("list", [*pictures, turned]))
    keys = [decoded_key(*sample_images(decode(row)), *sample_images(row)) for row in view]
    assert keys[:3] == list(map(image_key, pictures))
    assert keys[3] == image_key(ImageOps.exif_transpose(Image.open(turned))) != image_key(turned)


def test_datasets_with_custom_rows_are_returned_unchanged(pictures):
    dataset = dataset_of("column", pictures)
    transformed = dataset.with_transform(lambda rows: {"image": [i.rotate(90) for i in rows["image"]]})
    for given in (transformed, dataset.with_format("numpy"), dataset.remove_columns(["image"]), [{"image": "a.png"}]):
        assert undecoded(given) == (given, None)
