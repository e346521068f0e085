import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.families import FAMILIES


def reference(kind, folder, images):
    """The feature by the model's own class and processor, written out for each kind."""
    inputs = tf.AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")
    with torch.no_grad():
        if kind == "clip":
            return tf.CLIPModel.from_pretrained(folder).eval().vision_model(**inputs).pooler_output
        if kind == "clip_vision_model":
            return tf.CLIPVisionModel.from_pretrained(folder).eval()(**inputs).pooler_output
        if kind == "siglip":
            model = tf.SiglipModel.from_pretrained(folder).eval().vision_model
            return model(**inputs).last_hidden_state.mean(1)
        if kind == "siglip2":
            model = tf.Siglip2Model.from_pretrained(folder).eval().vision_model
            return model(**inputs).last_hidden_state.mean(1)
        model = tf.AutoModel.from_pretrained(folder).eval()
        tokens = model(**inputs).last_hidden_state
        return tokens.mean(1) if "siglip" in kind else tokens[:, 0]


@pytest.mark.parametrize("kind", [*FAMILIES, "dinov2_classifier"])
def test_the_feature_is_the_output_cls_token_or_the_mean_of_the_patches(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    images = make_images(3, size=(32, 32))
    teacher = VisionTeacher.from_pretrained(str(folder))
    features = teacher.encode(teacher.preprocess(images))
    assert features.shape == (3, teacher.dim) == (3, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, reference(kind, folder, images), rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [*FAMILIES, "dinov2_classifier"])
def test_patches_are_the_grid_without_cls_and_registers(kind, save_teacher, make_images):
    folder = save_teacher(kind)
    teacher = VisionTeacher.from_pretrained(str(folder))
    inputs = tf.AutoImageProcessor.from_pretrained(folder)(images=make_images(2, size=(32, 32)), return_tensors="pt")
    model = tf.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = getattr(model, "vision_model", model)(**inputs).last_hidden_state
    extra = {"dinov2_with_registers": 4, "dinov3_vit": 4}.get(kind, 0 if "siglip" in kind else 1)
    patches = teacher.encode_patches(teacher.preprocess(make_images(2, size=(32, 32))))
    assert patches.shape == (2, *teacher.grid, teacher.dim) == (2, 4, 4, 32)
    assert patches.dtype == torch.float32
    torch.testing.assert_close(patches.flatten(1, 2), tokens[:, extra:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(patches[:, 0, 1], patches[:, 1, 0])


def test_the_final_norm_is_applied(save_teacher, make_images):
    folder = save_teacher("dinov2")
    teacher = VisionTeacher.from_pretrained(str(folder))
    pixels = teacher.preprocess(make_images(1))
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"] *= 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    without = VisionTeacher.from_pretrained(str(folder)).encode(pixels)
    torch.testing.assert_close(without[0], weights["layernorm.bias"])
    assert not torch.allclose(without, teacher.encode(pixels))


def test_the_teacher_is_frozen_and_never_in_training_mode(save_teacher, make_images):
    folder = save_teacher("dinov2")
    # dropout shows whether a pass ran in training mode
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5, "drop_path_rate": 0.5}))
    teacher = VisionTeacher.from_pretrained(str(folder))
    pixels = teacher.preprocess(make_images(2))
    before = teacher.encode(pixels)
    teacher._model.train()
    assert torch.equal(teacher.encode(pixels), before)
    assert not before.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher._model.parameters())


def test_a_student_that_holds_the_teacher_neither_trains_nor_saves_it(save_teacher):
    teacher = VisionTeacher.from_pretrained(str(save_teacher("vit")))
    student = torch.nn.Linear(2, 2)
    student.teacher = teacher
    student.train()
    assert not teacher._model.training
    assert set(student.state_dict()) == {"weight", "bias"}


def test_a_surrounding_autocast_does_not_change_the_features(save_teacher, make_images):
    teacher = VisionTeacher.from_pretrained(str(save_teacher("dinov2")))
    pixels = teacher.preprocess(make_images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher.encode(pixels)
    assert torch.equal(inside, teacher.encode(pixels))


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip", "siglip2"])
def test_half_precision_gives_float32_features_close_to_full_precision(kind, save_teacher, make_images):
    folder = str(save_teacher(kind))
    full, half = VisionTeacher.from_pretrained(folder), VisionTeacher.from_pretrained(folder, dtype=torch.bfloat16)
    pixels = full.preprocess(make_images(2))
    features = half.encode(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, full.encode(pixels))
    assert torch.nn.functional.cosine_similarity(features, full.encode(pixels)).min() > 0.99


def test_a_checkpoint_stored_in_bfloat16_runs_in_float32_by_default(save_teacher, make_images):
    folder = save_teacher("dinov2")
    tf.Dinov2Model.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    teacher = VisionTeacher.from_pretrained(str(folder))
    assert {parameter.dtype for parameter in teacher._model.parameters()} == {torch.float32}


def test_missing_weights_are_an_error_not_random_numbers(save_teacher):
    folder = save_teacher("dinov2")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.mlp.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"my_key: .*dinov2 lack 1 tensors.*encoder\.layer\.1\.mlp\.fc1\.weight"):
        VisionTeacher.from_pretrained(str(folder), key="my_key")


def test_weights_that_no_feature_reads_may_be_missing(save_teacher, make_images):
    folder = save_teacher("siglip_vision_model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "head." not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    VisionTeacher.from_pretrained(str(folder))


def test_an_image_size_that_the_model_cannot_take_is_refused_at_loading(save_teacher, edit_json):
    folder = save_teacher("siglip")
    edit_json(folder / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(ValueError, match=r"hera_teacher: .*\(48, 48\) pixels.*\(32, 32\)"):
        VisionTeacher.from_pretrained(str(folder))


def test_dino_takes_other_image_sizes(save_teacher, edit_json, make_images):
    folder = save_teacher("dinov2")
    edit_json(folder / "preprocessor_config.json", crop_size={"height": 48, "width": 48}, size={"shortest_edge": 50})
    teacher = VisionTeacher.from_pretrained(str(folder))
    assert teacher.encode(teacher.preprocess(make_images(1))).shape == (1, 32)


def test_weights_in_several_files_give_the_same_features(save_teacher, make_images):
    folder = save_teacher("dinov2")
    whole = VisionTeacher.from_pretrained(str(folder))
    split = folder.with_name("split")
    shutil.copytree(folder, split)
    (split / "model.safetensors").unlink()
    tf.Dinov2Model.from_pretrained(folder).save_pretrained(split, max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 1
    pixels = whole.preprocess(make_images(1))
    assert torch.equal(VisionTeacher.from_pretrained(str(split)).encode(pixels), whole.encode(pixels))


def test_the_teacher_is_whole_while_a_zero3_config_lives(save_teacher, make_images):
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    folder = str(save_teacher("dinov2"))
    expected = VisionTeacher.from_pretrained(folder)
    pixels = expected.preprocess(make_images(1))
    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    try:
        teacher = VisionTeacher.from_pretrained(folder)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
        del config
    assert not any(hasattr(parameter, "ds_id") for parameter in teacher._model.parameters())
    assert torch.equal(teacher.encode(pixels), expected.encode(pixels))


def test_the_teacher_is_whole_on_every_rank_with_fsdps_efficient_loading(save_teacher, make_images, monkeypatch):
    folder = str(save_teacher("dinov2"))
    expected = VisionTeacher.from_pretrained(folder)
    pixels = expected.preprocess(make_images(1))
    # what rank 1 of a launch sees
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 1)
    assert tf.modeling_utils.is_fsdp_enabled()
    teacher = VisionTeacher.from_pretrained(folder)
    assert tf.modeling_utils.is_fsdp_enabled()
    assert torch.equal(teacher.encode(pixels), expected.encode(pixels))
