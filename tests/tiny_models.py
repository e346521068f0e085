"""Tiny random models of real classes: every text family, its VLMs, and a teacher; also rows with images."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

VOCAB = 64
PAD, IMAGE, VIDEO, VISION_START, VISION_END = 0, 60, 61, 62, 63
LAYERS, HEADS = 2, 4
_SIDE, _PATCH = 16, 8

# head_dim differs from hidden_size / heads if the architecture allows it, and two query heads share a key-value head
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DECODER_WITH_HEAD_DIM = DECODER | {"head_dim": 16}
# every expert sees every token, so each expert receives a gradient
_EXPERTS: dict[str, Any] = _DECODER_WITH_HEAD_DIM | {"num_experts_per_tok": 2, "num_local_experts": 2}
_ROUTED: dict[str, Any] = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}
_ROUTED |= {"topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
_LATENT |= {"v_head_dim": 12, "num_key_value_heads": HEADS}
# linear attention and softmax attention differ in the number and the width of their heads
_LINEAR: dict[str, Any] = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 10, "linear_conv_kernel_dim": 2}
_LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
_LOCAL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER = _LOCAL | {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
_PER_LAYER |= {"num_kv_shared_layers": 0}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}


def _mrope(pairs: int) -> dict[str, Any]:
    """Returns multimodal rotary parameters; time, height and width share the ``head_dim / 2`` frequencies."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [pairs - 4, 2, 2]}


_HALF_MROPE = {"rope_parameters": _mrope(8) | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
_MOE_QWEN = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _of(name: str, **fixed: Any) -> Callable[..., tf.PretrainedConfig]:
    """Returns a function that makes the tiny configuration of a text decoder with this ``model_type``."""

    def build(**kw: Any) -> tf.PretrainedConfig:
        known = name in CONFIG_MAPPING
        kind = CONFIG_MAPPING[name] if known else _config(name.removesuffix("_text")).sub_configs["text_config"]
        return kind(**_DECODER_WITH_HEAD_DIM | fixed | kw)

    return build


def _config(name: str) -> type[tf.PretrainedConfig]:
    """Returns the class of a configuration; skips the test if the installed transformers does not have it."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return CONFIG_MAPPING[name]


#: Families whose configuration needs only the sizes.
_PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gemma", "glm4", "smollm3", "cohere2")
_PLAIN += ("ministral", "ministral3", "olmo2")
#: The configuration of a tiny text decoder by ``model_type``. Qwen2-VL and Qwen2.5-VL have no key for ``head_dim``.
TEXT_CONFIGS: dict[str, Callable[..., tf.PretrainedConfig]] = {
    **{name: _of(name) for name in _PLAIN},
    "qwen2_vl_text": lambda **kw: tf.Qwen2VLTextConfig(**DECODER | {"rope_parameters": _mrope(6)} | kw),
    "qwen2_5_vl_text": lambda **kw: tf.Qwen2_5_VLTextConfig(**DECODER | {"rope_parameters": _mrope(6)} | kw),
    "qwen3_vl_text": lambda **kw: tf.Qwen3VLTextConfig(**_DECODER_WITH_HEAD_DIM | {"rope_parameters": _mrope(8)} | kw),
    "granite": lambda **kw: tf.GraniteConfig(**_DECODER_WITH_HEAD_DIM | {"residual_multiplier": 0.5} | kw),
    "mixtral": lambda **kw: tf.MixtralConfig(**_EXPERTS | kw),
    "qwen3_moe": lambda **kw: tf.Qwen3MoeConfig(**_EXPERTS | {"num_experts": 2, "moe_intermediate_size": 32} | kw),
    "llama4_text": lambda **kw: tf.Llama4TextConfig(**_EXPERTS | kw),
    "gpt_oss": lambda **kw: tf.GptOssConfig(**_EXPERTS | kw),
    "olmo3": _of("olmo3", **_LOCAL),
    "exaone4": _of("exaone4", sliding_window=64, **_LOCAL),
    "glm4_moe": _of("glm4_moe", **_ROUTED),
    "mistral4": _of("mistral4", **_ROUTED | _LATENT),
    "qwen3_5_text": _of("qwen3_5_text", **_LINEAR | _HALF_MROPE),
    "qwen3_5_moe_text": _of(
        "qwen3_5_moe_text", shared_expert_intermediate_size=32, **_LINEAR | _HALF_MROPE | _MOE_QWEN
    ),
    "qwen3_vl_moe_text": _of("qwen3_vl_moe_text", rope_parameters=_mrope(8), **_MOE_QWEN),
    "gemma3n_text": _of("gemma3n_text", laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0], **_PER_LAYER),
    "gemma4_text": _of("gemma4_text", global_head_dim=24, **_PER_LAYER),
    "glm4v_text": _of("glm4v_text", **_HALF_MROPE),
    "glm4v_moe_text": _of("glm4v_moe_text", **_ROUTED | _HALF_MROPE),
    "glm_ocr_text": _of("glm_ocr_text", **_HALF_MROPE),
    "lfm2": lambda **kw: tf.Lfm2Config(
        **DECODER | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False} | kw
    ),
    "ernie4_5_vl_moe_text": _of(
        "ernie4_5_vl_moe_text",
        moe_intermediate_size=[32, 32],
        moe_num_experts=2,
        moe_k=2,
        moe_num_shared_experts=1,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters=_mrope(8) | {"mrope_section": [3, 3, 2]},
    ),
    "paddleocr_vl_text": _of("paddleocr_vl_text", rope_parameters=_mrope(8)),
    "aria_text": _of("aria_text", moe_num_experts=2, moe_topk=2, moe_num_shared_experts=1),
    "deepseek_v3": _of("deepseek_v3", **_ROUTED | _LATENT | {"head_dim": 8}),
    "molmo2_text": _of("molmo2_text", additional_vocab_size=0),
}


def _other(kind: str, text: str, vision: dict[str, Any] | None = None, **keys: Any) -> Callable[..., nn.Module]:
    """Returns a function that makes a VLM; in ``vision``, a value of None removes a key."""

    def build(**kw: Any) -> nn.Module:
        tower = {name: value for name, value in (_VISION | (vision or {})).items() if value is not None}
        config = _config(kind)(text_config=TEXT_CONFIGS[text](**kw), vision_config=tower, **keys)
        return tf.AutoModelForImageTextToText.from_config(config)

    return build


_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


#: VLMs with the vision tower and the inputs of Qwen2-VL: their text decoder, and additional keys of the vision tower.
_QWEN_LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl_text", {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {"fullatt_block_indexes": [1], "window_size": 16}),
    "qwen3_vl": ("qwen3_vl_text", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "qwen3_5": ("qwen3_5_text", {"num_position_embeddings": 16}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"num_position_embeddings": 16}),
    "glm4v": ("glm4v_text", {"image_size": _SIDE}),
    "glm46v": ("glm4v_text", {"image_size": _SIDE, "model_type": "glm4v_vision"}),
    "glm4v_moe": ("glm4v_moe_text", {"image_size": _SIDE}),
    "glm_ocr": ("glm_ocr_text", {"image_size": _SIDE}),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe_text", {}),
    "paddleocr_vl": ("paddleocr_vl_text", {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": _SIDE}),
}


def _qwen_like(name: str, **kw: Any) -> nn.Module:
    text, more = _QWEN_LIKE[name]
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": _PATCH}
    vision |= {"out_hidden_size": 48} | more
    tokens = _QWEN_TOKENS | {"image_start_token_id": VISION_START, "image_end_token_id": VISION_END}
    text_config = TEXT_CONFIGS[text](**kw).to_dict()
    config = CONFIG_MAPPING[name](text_config=text_config, vision_config=vision, **tokens)
    return tf.AutoModelForImageTextToText.from_config(config)


def _llama4(**kw: Any) -> nn.Module:
    if tf.__version__ == "5.24.0":
        pytest.skip("transformers 5.24.0: no forward pass of Llama4ForConditionalGeneration works (image_outputs)")
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    vision = widths | {"patch_size": 4, "intermediate_size": 128, "rope_parameters": {"rope_theta": 10000.0}}
    return _other("llama4", "llama4_text", vision, image_token_index=IMAGE)(**kw)


#: Families that work as the text decoder of an ordinary LLaVA.
_IN_LLAVA = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "glm4", "granite", "smollm3", "cohere2")
_IN_LLAVA += ("ministral", "ministral3", "mixtral", "qwen3_moe", "gpt_oss", "olmo2", "olmo3", "exaone4", "glm4_moe")
_IN_LLAVA += ("mistral4", "deepseek_v3")

#: Text decoders that transformers can build without their VLM.
BARE = sorted(set(TEXT_CONFIGS) - {"ernie4_5_vl_moe_text", "paddleocr_vl_text"})
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_GEMMA4_VISION = _GROUPED | {"image_size": None, "pooling_kernel_size": 2, "position_embedding_size": 16}
_KIMI_VISION = {"image_size": None, "num_hidden_layers": 1, "pos_emb_height": 4, "pos_emb_width": 4}
_MOLMO2_ADAPTER = _VISION | _GROUPED | {"vision_feature_layer": [1, 0], "text_hidden_size": 48}
_SPOTS: dict[str, Any] = {"image_token_index": IMAGE}
_GEMMA3_SPOTS = _SPOTS | {"boi_token_index": VISION_START, "eoi_token_index": VISION_END}
_IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_GEMMA4_IDS = _IDS | {"boi_token_id": VISION_START, "eoi_token_id": VISION_END}
_TILES = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE]]
_NO_HEAD = {"vision_use_head": False}
#: The function that makes a tiny VLM, by name; keyword arguments go to the text configuration.
VLMS: dict[str, Callable[..., nn.Module]] = {
    **{f"llava-{text}": _other("llava", text, **_SPOTS) for text in _IN_LLAVA},
    "llava_next-mistral": _other("llava_next", "mistral", **_SPOTS, image_grid_pinpoints=_TILES),
    "internvl-qwen2": _other("internvl", "qwen2", {"patch_size": 4}, image_token_id=IMAGE, downsample_ratio=0.5),
    "gemma3": _other("gemma3", "gemma3_text", _NO_HEAD, **_GEMMA3_SPOTS, mm_tokens_per_image=4),
    "paligemma-gemma2": _other("paligemma", "gemma2", _NO_HEAD | {"projection_dim": 48}, **_SPOTS, projection_dim=48),
    **{name: partial(_qwen_like, name) for name in _QWEN_LIKE},
    "llama4": _llama4,
    "lfm2_vl": partial(
        _other("lfm2_vl", "lfm2", _NO_HEAD | {"num_patches": 16}, image_token_id=IMAGE, projector_hidden_size=32),
        layer_types=["full_attention"] * LAYERS,  # both layers have heads
    ),
    "gemma4": _other("gemma4", "gemma4_text", _GEMMA4_VISION, **_GEMMA4_IDS, audio_config=None),
    "aria": _other(
        "aria", "aria_text", {"model_type": "idefics3_vision"}, **_SPOTS, projector_patch_to_query_dict={4: 4}
    ),
    "kimi_k25": _other("kimi_k25", "deepseek_v3", _KIMI_VISION, **_QWEN_TOKENS, projection_hidden_size=32),
    "minicpmv4_6": _other("minicpmv4_6", "qwen3_5_text", {"image_size": 2 * _SIDE}, **_IDS, insert_layer_id=0),
    "mistral3-ministral3": _other(
        "mistral3", "ministral3", {"model_type": "pixtral", "head_dim": 16, "image_size": 2 * _SIDE}, **_SPOTS
    ),
    "molmo2": _other(
        "molmo2",
        "molmo2_text",
        _GROUPED | {"image_size": [_SIDE, 2 * _SIDE]},
        adapter_config=_MOLMO2_ADAPTER,
        image_patch_id=IMAGE,
    ),
}
#: Types of VLMs that the installed transformers lacks, because only newer releases have them.
UNKNOWN = {name for name in ("kimi_k25", "minicpmv4_6", "molmo2") if name not in CONFIG_MAPPING}


def _randomize(model: nn.Module, seed: int) -> nn.Module:
    # norms of ones and biases of zeros could hide a mistake
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def text_model(model_type: str, seed: int = 0, **config: Any) -> nn.Module:
    """Makes a causal LM of the family in training mode, or only the decoder if the family has no causal LM."""
    torch.manual_seed(seed)
    configuration = TEXT_CONFIGS[model_type](**config)
    known = type(configuration) in tf.MODEL_FOR_CAUSAL_LM_MAPPING
    build = tf.AutoModelForCausalLM if known else tf.AutoModel
    return _randomize(build.from_config(configuration), seed).train()


def vlm(name: str, seed: int = 0, **config: Any) -> nn.Module:
    """Makes a VLM in training mode."""
    torch.manual_seed(seed)
    return _randomize(VLMS[name](**config), seed).train()


def text_batch(rows: int = 3, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Makes rows of tokens of decreasing length, padded on the right."""
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    for row in range(1, rows):
        attention[row, length - row :] = 0
    return {"input_ids": ids.masked_fill(attention == 0, PAD), "attention_mask": attention}


def vlm_batch(model: nn.Module, rows: int = 2, length: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Makes rows with an image before the text, and the additional inputs that the architecture's processor makes."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    pixels, n_tokens, extra = _pixels(kind, rows, generator)
    text = text_batch(rows, length, seed)
    ones = torch.ones(rows, n_tokens, dtype=torch.long)
    start, end = ones[:, :1] * VISION_START, ones[:, :1] * VISION_END
    ids = torch.cat([start, ones * IMAGE, end, text["input_ids"]], dim=1)
    attention = torch.cat([torch.ones(rows, n_tokens + 2, dtype=torch.long), text["attention_mask"]], dim=1)
    batch = {"input_ids": ids, "attention_mask": attention, **pixels, **extra}
    if kind in ("gemma3", "paligemma"):
        # PaliGemma: type 0 is the prefix (image and prompt), type 1 the suffix. Gemma 3: type 1 is the image.
        batch["token_type_ids"] = (ids == IMAGE).long() if kind == "gemma3" else (ids < 50).long()
    if kind in _QWEN_LIKE or kind in ("gemma4", "molmo2"):
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return batch


def _pixels(kind: str, rows: int, generator: torch.Generator) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
    """Returns the pixels, the number of image tokens per row, and further inputs."""
    if kind in _QWEN_LIKE:
        # 4 x 4 patches, 3 channels, 1 or 2 frames, merged 2 x 2
        grid = torch.tensor([[1, 4, 4]] * rows)
        frames = 1 if kind in ("ernie4_5_vl_moe", "paddleocr_vl") else 2
        values = torch.randn(rows * 16, 3 * frames * _PATCH * _PATCH, generator=generator)
        if kind == "paddleocr_vl":
            values = values.unflatten(1, (3, _PATCH, _PATCH))
        return {"pixel_values": values}, 4, {"image_grid_thw": grid}
    if kind in ("gemma4", "lfm2_vl"):
        # 4 x 4 patches, merged 2 x 2
        values = torch.rand(rows, 16, 3 * _PATCH * _PATCH, generator=generator)
        shapes = {"spatial_shapes": torch.full((rows, 2), 4), "pixel_attention_mask": torch.ones(rows, 16).long()}
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(rows, -1, -1)
        return {"pixel_values": values}, 4, shapes if kind == "lfm2_vl" else {"image_position_ids": places}
    if kind == "llava_next":
        # 2 x 4 patches in two tiles, a newline after each row, and a base view of 2 x 2 patches
        values = torch.randn(rows, 3, 3, _SIDE, _SIDE, generator=generator)
        return {"pixel_values": values}, 4 + 2 * (4 + 1), {"image_sizes": torch.tensor([[_SIDE, 2 * _SIDE]] * rows)}
    if kind == "kimi_k25":
        values = torch.randn(rows * 16, 3, _PATCH, _PATCH, generator=generator)
        return {"pixel_values": values}, 4, {"image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}
    if kind == "minicpmv4_6":
        # 8 x 8 patches in one line, merged 2 x 2 twice
        values = torch.randn(1, 3, _PATCH, rows * 64 * _PATCH, generator=generator)
        return {"pixel_values": values}, 4, {"target_sizes": torch.full((rows, 2), 8)}
    if kind == "molmo2":
        # 2 x 4 patches, merged in pairs
        values = torch.randn(rows, 8, 3 * _PATCH * _PATCH, generator=generator)
        grid = {"image_token_pooling": torch.arange(rows * 8).view(-1, 2)}
        return {"pixel_values": values}, 4, grid | {"image_grids": torch.tensor([[2, 2, 0, 0]] * rows)}
    if kind == "mistral3":
        values = torch.randn(rows, 3, 2 * _SIDE, 2 * _SIDE, generator=generator)
        return {"pixel_values": values}, 4, {"image_sizes": torch.full((rows, 2), 2 * _SIDE)}
    return {"pixel_values": torch.randn(rows, 3, _SIDE, _SIDE, generator=generator)}, 4, {}


def answer_labels(batch: dict[str, Tensor], prompt: int = 3) -> Tensor:
    """Returns labels for all text except its first ``prompt`` tokens."""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100).masked_fill(ids >= IMAGE, -100)
    text_start = int((ids[0] >= IMAGE).sum())
    labels[:, : text_start + prompt] = -100
    return labels


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies the weights of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Returns whether both have the same names and, bit for bit, the same tensors."""
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; a value of None removes its key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# -- dataset rows, and the teacher for their images ------------------------------------------------------------------

TEACHER_SIZE = 12  # pixels; 3 x 3 patches


@cache
def teacher_folder() -> str:
    """Returns the folder of a tiny random DINOv2, with the same weights in every process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny_teacher_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = tf.Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=TEACHER_SIZE, patch_size=4
    )
    torch.manual_seed(4)
    model = tf.Dinov2Model(config)
    with torch.no_grad():  # the usual initialization gives every image almost the same feature
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    # in a process group, transformers 5.24's save_pretrained writes nothing on ranks other than 0
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    size = {"height": TEACHER_SIZE, "width": TEACHER_SIZE}
    processor = {"image_processor_type": "BitImageProcessor", "do_resize": True, "size": size, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def autoencoder(width: int, channels: int, groups: int) -> nn.Module:
    """Makes a tiny diffusers AutoencoderKL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(width, width), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=groups,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip


@cache
def autoencoder_folder() -> str:
    """Returns the folder of an autoencoder whose latents have no noise."""
    folder = tempfile.mkdtemp(prefix="tiny_autoencoder_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(5)
    model = autoencoder(4, 2, 2)
    with torch.no_grad():
        model.encoder.conv_out.weight[2:] = 0
        model.encoder.conv_out.bias[2:] = -30
    model.save_pretrained(folder)
    return folder


def student_processor() -> tf.SiglipImageProcessor:
    """Returns an image processor for the tiny VLMs."""
    return tf.SiglipImageProcessor(size={"height": _SIDE, "width": _SIDE})


def noise_images(n: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[Image.Image]:
    """Makes distinct images of noise."""
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def image_files(folder: Path, n: int, size: tuple[int, int] = (16, 16)) -> list[str]:
    """Saves noise images, and returns their paths."""
    paths = [str(folder / f"{number}.png") for number in range(n)]
    for image, path in zip(noise_images(n, size), paths, strict=True):
        image.save(path)
    return paths


def image_rows(model: nn.Module, n: int, with_images: bool = True) -> list[dict[str, Any]]:
    """Makes rows of a dataset: inputs of the VLM, labels on answers of different lengths, and an image."""
    rows = []
    for seed, image in enumerate(noise_images(n, (9, 9))):
        batch = vlm_batch(model, rows=1, seed=seed)
        labels = answer_labels(batch, prompt=2 + seed % 5)
        rows.append({**batch, "labels": labels, "images": [image] if with_images else []})
    return rows


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collates rows in which every column contains tensors."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
