"""Fixtures: tiny random teachers of each supported kind, saved in the same format as real checkpoints."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import transformers as tf

from tests.tiny_models import noise_images

torch.set_num_threads(1)

SIDE = 32
make_images = partial(noise_images, size=(40, 56))
#: The sizes of a tiny encoder, under the names in the configurations of all kinds.
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
_SIZES |= {"intermediate_size": 48, "mlp_ratio": 2, "num_key_value_groups": 1}
_SIZES |= {"num_register_tokens": 3, "n_cls_tokens": 3}
_TEXT = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT |= {"vocab_size": 50, "max_position_embeddings": 8}
_SQUARE = {"height": SIDE, "width": SIDE}
#: The configurations of kinds that have other keys.
_SPECIAL = {key: {"vision_config": _SIZES, "text_config": _TEXT} for key in ("clip", "siglip", "metaclip_2")}
_SPECIAL["dinov3_convnext"] = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "image_size": SIDE}


def _model(kind: str) -> tf.PreTrainedModel:
    if kind == "dinov2_classifier":
        return tf.Dinov2ForImageClassification(tf.Dinov2Config(**_SIZES))
    model_type = "mlcd_vision_model" if kind == "mlcd" else kind
    return tf.AutoModel.from_config(tf.AutoConfig.for_model(model_type, **_SPECIAL.get(kind, _SIZES)))


_TIMM_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
#: Architectures of timm; for each, arguments that make it tiny, and the side of an image in pixels.
TIMM_MODELS = {
    "vit_small_patch14_reg4_dinov2": (_TIMM_VIT, 28),
    "vit_small_patch16_dinov3": (_TIMM_VIT, 32),
    "vit_pe_core_tiny_patch16_384": (_TIMM_VIT, 32),
    "vit_base_patch16_siglip_224": (_TIMM_VIT, 32),
    "aimv2_large_patch14_224": (_TIMM_VIT, 28),
    "beit_base_patch16_224": (_TIMM_VIT, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 32)}, 64),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
        64,
    ),
    "tf_efficientnet_lite0": ({}, 64),
}


def _processor(kind: str):
    if kind.startswith("dinov2"):
        return tf.BitImageProcessor(size={"shortest_edge": 36}, crop_size=_SQUARE)
    if kind.startswith("dinov3"):
        return tf.DINOv3ViTImageProcessor(size=_SQUARE)
    if "clip" in kind or kind.startswith("mlcd"):
        return tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=_SQUARE)
    if kind.startswith("siglip"):
        return tf.SiglipImageProcessor(size=_SQUARE)
    return tf.ViTImageProcessor(size=_SQUARE)


def _randomize(model: torch.nn.Module) -> None:
    # New models have norms of one and biases of zero, which would hide a norm that is not applied.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture
def save_teacher(tmp_path):
    """save_teacher(kind, name=kind, seed=0) saves a tiny random teacher with its processor and returns the folder."""

    def save(kind: str, name: str | None = None, seed: int = 0) -> Path:
        folder = tmp_path / (name or kind)
        torch.manual_seed(seed)
        model = _model(kind)
        _randomize(model)
        model.save_pretrained(folder)
        _processor(kind).save_pretrained(folder)
        if kind == "mlcd":  # the model type in the authors' checkpoints
            config = (folder / "config.json").read_text()
            (folder / "config.json").write_text(config.replace("mlcd_vision_model", kind))
        return folder

    return save


@pytest.fixture
def save_timm(tmp_path):
    """save_timm(name) saves a tiny random model as timm does for the hub, and returns the model and the folder."""

    def save(name: str) -> tuple[torch.nn.Module, Path]:
        args, pixels = TIMM_MODELS[name]
        if pixels < 64 or name.startswith("swin"):
            args = args | {"img_size": pixels}
        torch.manual_seed(0)
        model = timm.create_model(
            name, num_classes=0, pretrained_cfg_overlay={"input_size": (3, pixels, pixels)}, **args
        )
        _randomize(model)
        for buffer in (buffer for key, buffer in model.named_buffers() if "running" in key):
            buffer.add_(torch.rand_like(buffer))
        timm.models.save_for_hf(model, str(tmp_path / name), safe_serialization=True)
        return model.eval(), tmp_path / name

    return save


@pytest.fixture
def zero3():
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_batch_size": 1})
    yield deepspeed.is_deepspeed_zero3_enabled
    deepspeed.unset_hf_deepspeed_config()
    del config


@pytest.fixture
def fsdp(monkeypatch):
    """Imitates rank 1 of an FSDP launch with efficient loading."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *args: 1)
    return tf.modeling_utils.is_fsdp_enabled
