import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from llamafactory_hera.teachers import encoder
from llamafactory_hera.teachers.encoder import FAMILIES, TeacherProcessor, VisionTeacher, teacher_fingerprint
from tests.tiny_models import edit_json

from .conftest import TIMM_MODELS, make_images

KINDS = [*(kind for kind in FAMILIES if kind != "timm_wrapper"), "dinov2_classifier"]
#: Kinds whose feature is the mean of the patches, and kinds whose feature is the pooled output.
MEAN = ("siglip", "siglip_vision_model", "aimv2_vision_model", "ijepa")
POOLED = ("clip", "clip_vision_model", "metaclip_2", "mlcd", "mlcd_vision_model", "pixio", "dinov3_convnext")


def load(folder, **options):
    return VisionTeacher.from_pretrained(str(folder), "cpu", **options)


def processor_of(folder):
    return TeacherProcessor(VisionTeacher.check(str(folder)))


# files


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "qwen2"}', r"has model_type 'qwen2'; give a vision model .*dinov2"),
        ("config.json", "{}", "has model_type None"),
        ("preprocessor_config.json", None, r"contains no image processor \(preprocessor_config\.json or"),
    ],
)
def test_a_folder_that_cannot_be_a_teacher_is_refused(file, content, message, save_teacher):
    folder = save_teacher("dinov2")
    (folder / file).write_text(content) if content else (folder / file).unlink()
    with pytest.raises(ValueError, match=f"^hera_teacher: {re.escape(str(folder))} {message}"):
        VisionTeacher.check(str(folder))


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


def test_the_fingerprint_depends_on_each_byte_of_weights_and_settings_but_not_on_the_folder(save_teacher, tmp_path):
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


def test_pixels_are_those_of_the_models_processor_for_images_of_any_mode(save_teacher):
    folder = save_teacher("siglip")
    # a processor for text and images stores these settings in its own file
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    images, processor = make_images(1) + make_images(1, size=(70, 30), seed=1), processor_of(folder)
    reference = tf.AutoImageProcessor.from_pretrained(folder)
    expected = torch.cat([reference(images=image, return_tensors="pt")["pixel_values"] for image in images])
    assert torch.equal(processor.batch(images), expected)
    assert processor.pixel_size == expected.shape[2:] == (32, 32)
    for image in (images[0].convert(mode) for mode in ("L", "RGBA", "P")):
        assert torch.equal(processor(image), processor(image.convert("RGB")))


def test_a_processor_that_produces_images_of_different_sizes_is_refused(save_teacher):
    folder = save_teacher("dinov2")
    edit_json(folder / "preprocessor_config.json", do_center_crop=False)
    with pytest.raises(
        ValueError, match=r"^hera_teacher: .*dinov2 produces images of different sizes.*do_center_crop"
    ):
        processor_of(folder)


# features


@pytest.mark.parametrize("kind", KINDS)
def test_features_summarize_the_image_and_patch_features_keep_the_grid(kind, save_teacher):
    folder = save_teacher(kind)
    images = make_images(3, size=(32, 32))
    model = tf.AutoModel.from_pretrained(folder).eval()
    inputs = tf.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    if hasattr(model, "text_model"):  # `get_image_features` of CLIP returns projected features
        model = model.vision_model
    with torch.no_grad():
        output = model(**inputs)
    tokens = output.last_hidden_state
    before_patches = {"dinov2_with_registers": 4, "dinov3_vit": 4, "pixio": 3}.get(kind, 0 if kind in MEAN else 1)
    expected = output.pooler_output if kind in POOLED else tokens.mean(1) if kind in MEAN else tokens[:, 0]

    teacher = load(folder)
    pixels = teacher.processor.batch(images)
    features = teacher.encode(pixels)
    assert features.shape == (3, teacher.dim) == (3, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3
    check_patches(teacher, pixels, tokens[:, before_patches:])


def check_patches(teacher, pixels, expected):
    """Compares the patch features at the teacher's own size with the model's tokens, and computes a larger grid."""
    if not teacher.info.family.patches:
        with pytest.raises(ValueError, match=r"^hera_teacher: .* has no square grid of patch tokens"):
            VisionTeacher.check(teacher.info.name, 4)
        return
    student = (pixels * teacher.processor.std + teacher.processor.mean).clamp(0, 1)
    side = pixels.shape[-1] // teacher.info.config.patch_size
    patches = teacher.patch_features(student, side)
    assert patches.shape == (3, side**2, teacher.dim)
    assert patches.dtype == torch.float32
    torch.testing.assert_close(patches, expected, rtol=1e-5, atol=1e-5)
    patches = patches.unflatten(1, (side, side))
    assert not torch.allclose(patches[:, 0, 1], patches[:, 1, 0])
    if teacher.info.family.any_size:
        assert teacher.patch_features(student, side + 1).shape == (3, (side + 1) ** 2, teacher.dim)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_features_patches_and_pixels_of_a_timm_model_are_those_of_timm(name, save_timm):
    model, folder = save_timm(name)
    images = make_images(3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected_pixels = torch.stack([transform(image) for image in images])
    with torch.no_grad():
        expected, tokens = model(expected_pixels), model.forward_features(expected_pixels)

    teacher = load(folder)
    pixels = pickle.loads(pickle.dumps(teacher.processor)).batch(images)
    assert torch.equal(pixels, expected_pixels)
    assert teacher.processor.pixel_size == pixels.shape[2:]
    features = teacher.encode(pixels)
    assert features.shape == (3, teacher.dim)
    assert (features[0] - features[1]).abs().max() > 1e-4
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    plain = not name.startswith(("convnext", "swin", "tf_"))
    assert teacher.info.family.patches == plain
    check_patches(teacher, pixels, tokens[:, model.num_prefix_tokens :] if plain else None)


@pytest.mark.parametrize(
    ("change", "available", "message"),
    [
        ({}, False, "needs timm, which is not installed; pip install timm"),
        ({"architecture": "vit_nothing"}, True, r"timm cannot pool the features of .*'vit_nothing' is not supported"),
        ({"architecture": "qwen3_vit_416m_enc", "model_args": {}}, True, "timm cannot pool .* use another model"),
    ],
)
def test_a_timm_model_that_cannot_be_a_teacher_is_refused(change, available, message, save_timm, monkeypatch):
    _, folder = save_timm("convnext_atto")
    edit_json(folder / "config.json", **change)
    monkeypatch.setattr(tf.utils, "is_timm_available", lambda: available)
    with pytest.raises(ValueError, match=f"^hera_teacher: .*{message}"):
        VisionTeacher.check(str(folder))


def test_the_page_lists_every_kind_of_teacher():
    page = (Path(__file__).parents[2] / "docs/method.md").read_text(encoding="utf-8")
    table = page.partition("| `model_type` |")[2].partition("\n\n")[0]
    rows = {kind: row for row in table.splitlines() for kind in re.findall(r"`(\w+)`", row.split("|")[1:][0:1][0])}
    assert set(rows) == set(FAMILIES)
    for kind, row in rows.items():
        feature, grid = row.split("|")[3:5]
        family = FAMILIES[kind]
        assert {"cls": "CLS", "pooled": "pooled", "mean": "mean of the patches"}[family.output] in feature
        if kind != "timm_wrapper":
            assert grid.strip() == ("any" if family.any_size else "its own" if family.patches else "–")


def test_the_teacher_is_frozen_and_independent_of_the_training_step(save_teacher):
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


def test_half_precision_gives_float32_features_close_to_full_precision(save_teacher):
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


def test_a_teacher_of_fixed_size_needs_the_grid_of_the_students_tokens(save_teacher):
    for kind, side in (("dinov2", 5), ("clip", 4)):
        folder = save_teacher(kind)
        assert VisionTeacher.check(str(folder), side).path == folder
    with pytest.raises(ValueError, match=r"^hera_teacher: .*clip accepts only images of 32 pixels .* 5 x 5 tokens"):
        VisionTeacher.check(str(folder), 5)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_every_rank_has_a_complete_teacher(engine, save_teacher, request):
    folder = save_teacher("dinov2")
    expected = load(folder)
    pixels = expected.processor.batch(make_images(1))
    enabled = request.getfixturevalue(engine)
    assert enabled()
    teacher = load(folder)
    assert enabled()
    assert not any(hasattr(parameter, "ds_id") for parameter in teacher._model.parameters())
    assert torch.equal(teacher.encode(pixels), expected.encode(pixels))
