import json
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from llamafactory_hera.teachers.encoder import (
    FAMILIES,
    TeacherProcessor,
    VisionTeacher,
    check_teacher,
    teacher_fingerprint,
)

KINDS = [*FAMILIES, "dinov2_classifier"]


def load(folder, **options):
    return VisionTeacher.from_pretrained(str(folder), **options)


def processor_of(folder):
    return TeacherProcessor(check_teacher(str(folder)))


# the image processor


@pytest.mark.parametrize("kind", ["dinov2", "dinov3_vit", "vit", "clip", "siglip"])
def test_pixels_are_those_of_the_models_own_processor(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    processor = processor_of(folder)
    images = make_images(2) + make_images(1, size=(70, 30), seed=1)
    own = tf.AutoImageProcessor.from_pretrained(folder)
    expected = torch.cat([own(images=image, return_tensors="pt")["pixel_values"] for image in images])
    assert torch.equal(processor.batch(images), expected)
    for image in (images[0].convert(mode) for mode in ("L", "RGBA", "P")):
        assert torch.equal(processor(image), processor(image.convert("RGB")))
    assert processor.pixel_size == (32, 32)
    assert processor(images[2]).shape == (3, 32, 32)


def test_naflex_pixels_are_those_of_the_own_processor_for_an_image_of_the_grids_size(save_teacher, make_images):
    folder = save_teacher("siglip2")
    image = make_images(1, size=(32, 32))[0]
    own = tf.AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")
    pixels = processor_of(folder)(image)
    # patch 5 of the 4 x 4 grid is the second of the second row
    patch = own["pixel_values"][0, 5].reshape(8, 8, 3).permute(2, 0, 1)
    assert torch.equal(pixels[:, 8:16, 8:16], patch)
    assert pixels.shape == (3, 32, 32)


@pytest.mark.parametrize("kind", ["dinov2", "siglip2"])
def test_the_processor_works_after_pickling_in_loader_workers_and_without_weights(
    kind, save_teacher, make_images, monkeypatch
):
    folder = save_teacher(kind)

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", refuse)
    processor = processor_of(folder)
    images = make_images(4)
    expected = processor.batch(images)
    assert torch.equal(pickle.loads(pickle.dumps(processor)).batch(images), expected)
    loader = DataLoader(images, batch_size=2, num_workers=2, collate_fn=processor.batch)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_the_processor_inside_a_text_and_image_processor_is_found(save_teacher, make_images):
    folder = save_teacher("siglip")
    expected = processor_of(folder).batch(make_images(2))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert torch.equal(processor_of(folder).batch(make_images(2)), expected)


# features


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_cls_token_or_the_mean_of_the_patches_and_patches_their_grid(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    images = make_images(3, size=(32, 32))
    # by the model's own class and processor
    model = tf.AutoModel.from_pretrained(folder).eval()
    inputs = tf.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    read = model
    if hasattr(model, "text_model"):  # CLIP projects what this method gives
        read = model.vision_model if kind == "clip" else model.get_image_features
    with torch.no_grad():
        output = read(**inputs)
    tokens = output.last_hidden_state
    before_patches = {"dinov2_with_registers": 4, "dinov3_vit": 4}.get(kind, 0 if "siglip" in kind else 1)
    expected = output.pooler_output if "clip" in kind else tokens.mean(1) if "siglip" in kind else tokens[:, 0]

    teacher = load(folder)
    pixels = teacher.processor.batch(images)
    features = teacher.encode(pixels)
    seen = (pixels * teacher.processor.std + teacher.processor.mean).clamp(0, 1)
    patches = teacher.patch_features(seen, 4).unflatten(1, (4, 4))
    assert features.shape == (3, teacher.dim) == (3, 32)
    assert patches.shape == (3, 4, 4, teacher.dim) == (3, 4, 4, 32)
    assert features.dtype == patches.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, before_patches:], rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3
    assert not torch.allclose(patches[:, 0, 1], patches[:, 1, 0])


def test_the_final_norm_is_applied(save_teacher, make_images):
    folder = save_teacher("dinov2")
    teacher = load(folder)
    pixels = teacher.processor.batch(make_images(1))
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"] *= 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    without = load(folder).encode(pixels)
    torch.testing.assert_close(without[0], weights["layernorm.bias"])
    assert not torch.allclose(without, teacher.encode(pixels))


def test_the_teacher_is_frozen_never_in_training_mode_and_knows_nothing_of_the_step_around_it(
    save_teacher, make_images, edit_json
):
    folder = save_teacher("dinov2")
    # dropout shows whether a pass ran in training mode
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
    # a student that holds it neither trains nor saves it
    student = torch.nn.Linear(2, 2)
    student.teacher = teacher
    student.train()
    assert not teacher._model.training
    assert set(student.state_dict()) == {"weight", "bias"}


# loading


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "siglip2"])
def test_half_precision_gives_float32_features_close_to_full_precision(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    full, half = load(folder), load(folder, dtype=torch.bfloat16)
    pixels = full.processor.batch(make_images(2))
    features = half.encode(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, full.encode(pixels))
    assert torch.nn.functional.cosine_similarity(features, full.encode(pixels)).min() > 0.99


def test_weights_in_several_files_and_stored_in_bfloat16_give_the_same_features(save_teacher, make_images):
    folder = save_teacher("dinov2")
    tf.Dinov2Model.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    whole = load(folder)
    assert whole._model.dtype == torch.float32
    pixels = whole.processor.batch(make_images(1))
    model = tf.Dinov2Model.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    split = load(folder)
    assert torch.equal(split.encode(pixels), whole.encode(pixels))
    assert split.fingerprint == teacher_fingerprint(folder) != whole.fingerprint


@pytest.mark.parametrize(
    ("kind", "lost", "refused"),
    [
        ("dinov2", "encoder.layer.1.mlp.fc1.weight", True),
        ("siglip_vision_model", "head.", False),  # which no feature reads
    ],
)
def test_missing_weights_are_an_error_not_random_numbers(kind, lost, refused, save_teacher):
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


@pytest.mark.parametrize(
    ("kind", "settings", "refused"),
    [
        ("siglip", {"size": {"height": 48, "width": 48}}, r"siglip gives images of \(48, 48\) pixels.*\(32, 32\)"),
        ("dinov2", {"do_center_crop": False}, r"dinov2 gives images of different sizes.*do_center_crop"),
        ("dinov2", {"crop_size": {"height": 48, "width": 48}, "size": {"shortest_edge": 50}}, None),  # it takes any
    ],
)
def test_images_that_the_model_cannot_take_are_refused_at_loading(
    kind, settings, refused, save_teacher, edit_json, make_images
):
    folder = save_teacher(kind)
    edit_json(folder / "preprocessor_config.json", **settings)
    if refused is None:
        teacher = load(folder)
        assert teacher.encode(teacher.processor.batch(make_images(1))).shape == (1, 32)
        return
    with pytest.raises(ValueError, match=f"hera_teacher: .*{refused}"):
        load(folder)


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
