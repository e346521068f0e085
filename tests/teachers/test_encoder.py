import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from llamafactory_hera.teachers import encoder
from llamafactory_hera.teachers.encoder import FAMILIES, TeacherProcessor, VisionTeacher, teacher_fingerprint

KINDS = [*FAMILIES, "dinov2_classifier"]


def load(folder, **options):
    return VisionTeacher.from_pretrained(str(folder), "cpu", **options)


def processor_of(folder):
    return TeacherProcessor(VisionTeacher.check(str(folder)))


# files


def remove(name):
    return lambda folder: (folder / name).unlink()


def write_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write_config('{"model_type": "qwen2"}'), r"has model_type 'qwen2'; give a vision model .*dinov2"),
        (write_config("{}"), "has model_type None"),
        (remove("preprocessor_config.json"), r"contains no image processor \(preprocessor_config\.json or"),
    ],
)
def test_a_folder_that_cannot_be_a_teacher_is_refused_with_key_value_and_remedy(damage, message, save_teacher):
    folder = save_teacher("dinov2")
    damage(folder)
    with pytest.raises(ValueError, match=f"^hera_teacher: .*{message}") as caught:
        VisionTeacher.check(str(folder))
    assert str(folder) in str(caught.value)


def test_weights_of_a_hub_model_are_fetched_after_the_checks(save_teacher, monkeypatch):
    folder, fetched = save_teacher("dinov2"), []
    monkeypatch.setattr(encoder, "local_folder", lambda *args, weights: fetched.append(weights) or folder)
    monkeypatch.setattr(tf.PreTrainedModel, "__init__", None)  # no model is created
    assert VisionTeacher.check("some-org/teacher").path == folder
    assert fetched == [False, True]
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="some-org/teacher contains no image processor"):
        VisionTeacher.check("some-org/teacher")
    assert fetched == [False, True, False]


def test_the_fingerprint_depends_on_each_byte_of_weights_and_settings_but_not_on_the_folder(
    save_teacher, edit_json, tmp_path
):
    folder = save_teacher("dinov2")
    model = tf.Dinov2Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    seen = {teacher_fingerprint(folder)}
    assert {teacher_fingerprint(shutil.copytree(folder, tmp_path / "elsewhere"))} == seen
    path = max(folder.glob("*.safetensors"))
    content = path.read_bytes()
    for at in (len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(teacher_fingerprint(folder))
    edit_json(folder / "config.json", layer_norm_eps=1e-3)
    seen.add(teacher_fingerprint(folder))
    edit_json(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    seen.add(teacher_fingerprint(folder))
    assert len(seen) == 5
    assert {len(fingerprint) for fingerprint in seen} == {64}


# the image processor


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit", "clip", "siglip"])
def test_pixels_are_those_of_the_models_processor(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    if kind == "siglip":  # a processor for text and images stores these settings in its own file
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    processor = processor_of(folder)
    images = make_images(2) + make_images(1, size=(70, 30), seed=1)
    reference = tf.AutoImageProcessor.from_pretrained(folder)
    expected = torch.cat([reference(images=image, return_tensors="pt")["pixel_values"] for image in images])
    assert torch.equal(processor.batch(images), expected)
    assert processor.pixel_size == expected.shape[2:] == (32, 32)
    for image in (images[0].convert(mode) for mode in ("L", "RGBA", "P")):
        assert torch.equal(processor(image), processor(image.convert("RGB")))


def test_a_processor_that_gives_images_of_different_sizes_is_refused(save_teacher, edit_json):
    folder = save_teacher("dinov2")
    edit_json(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(
        ValueError, match=r"^hera_teacher: .*dinov2 produces images of different sizes.*do_center_crop"
    ):
        processor_of(folder)


# features


@pytest.mark.parametrize("kind", KINDS)
def test_features_summarize_the_image_and_patch_features_keep_the_grid(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    images = make_images(3, size=(32, 32))
    model = tf.AutoModel.from_pretrained(folder).eval()
    inputs = tf.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    forward = model
    if hasattr(model, "text_model"):  # CLIP's `get_image_features` returns projected features
        forward = model.vision_model if kind == "clip" else model.get_image_features
    with torch.no_grad():
        output = forward(**inputs)
    tokens = output.last_hidden_state
    before_patches = {"dinov2_with_registers": 4, "dinov3_vit": 4}.get(kind, 0 if "siglip" in kind else 1)
    expected = output.pooler_output if "clip" in kind else tokens.mean(1) if "siglip" in kind else tokens[:, 0]

    teacher = load(folder)
    pixels = teacher.processor.batch(images)
    features = teacher.encode(pixels)
    student = (pixels * teacher.processor.std + teacher.processor.mean).clamp(0, 1)
    patches = teacher.patch_features(student, 4).unflatten(1, (4, 4))
    assert features.shape == (3, teacher.dim) == (3, 32)
    assert patches.shape == (3, 4, 4, teacher.dim)
    assert features.dtype == patches.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, before_patches:], rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert not torch.allclose(patches[:, 0, 1], patches[:, 1, 0])


def test_the_teacher_is_frozen_and_independent_of_the_training_step_around_it(save_teacher, make_images, edit_json):
    folder = save_teacher("dinov2")
    # Dropout reveals a pass in training mode.
    edit_json(folder / "config.json", hidden_dropout_prob=0.5, drop_path_rate=0.5)
    teacher = load(folder)
    pixels = teacher.processor.batch(make_images(2))
    before = teacher.encode(pixels)
    teacher._model.train()
    assert torch.equal(teacher.encode(pixels), before)
    assert not before.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.encode(pixels), before)
    student = torch.nn.Linear(2, 2)
    student.teacher = teacher
    student.train()
    assert not teacher._model.training
    assert set(student.state_dict()) == {"weight", "bias"}


# loading


def test_half_precision_gives_float32_features_close_to_full_precision(save_teacher, make_images):
    folder = save_teacher("clip")
    full, half = load(folder), load(folder, dtype=torch.bfloat16)
    pixels = full.processor.batch(make_images(2))
    features = half.encode(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, full.encode(pixels))
    assert torch.nn.functional.cosine_similarity(features, full.encode(pixels)).min() > 0.99


@pytest.mark.parametrize(
    ("kind", "lost", "refused"),
    [("dinov2", "encoder.layer.1.mlp.fc1.weight", True), ("siglip_vision_model", "head.", False)],
)
def test_missing_weights_are_an_error_unless_no_feature_depends_on_them(kind, lost, refused, save_teacher):
    folder = save_teacher(kind)
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if not refused:
        assert load(folder).dim == 32
        return
    with pytest.raises(ValueError, match=rf"hera_teacher: .*{kind} lack 1 tensors.*{lost}"):
        load(folder)


@pytest.mark.parametrize(("kind", "side", "fits"), [("clip", 4, True), ("clip", 5, False), ("dinov2", 5, True)])
def test_a_teacher_of_fixed_size_needs_the_grid_of_the_students_tokens(kind, side, fits, save_teacher):
    folder = save_teacher(kind)
    if fits:
        assert VisionTeacher.check(str(folder), side).path == folder
        return
    with pytest.raises(ValueError, match=r"^hera_teacher: .*clip accepts only images of 32 pixels .* 5 x 5 tokens"):
        VisionTeacher.check(str(folder), side)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_the_teacher_is_whole_on_every_rank(engine, save_teacher, make_images, request):
    folder = save_teacher("dinov2")
    expected = load(folder)
    pixels = expected.processor.batch(make_images(1))
    enabled = request.getfixturevalue(engine)
    assert enabled()
    teacher = load(folder)
    assert enabled()
    assert not any(hasattr(parameter, "ds_id") for parameter in teacher._model.parameters())
    assert torch.equal(teacher.encode(pixels), expected.encode(pixels))
