"""The one table of backbones: what `build`, the recipes and the tests know of each model.

Sizes are those of the checkpoints' own ``config.json``; the heads are the paper's (arXiv 2606.23885, table 5), least
aligned first, chosen against DINOv2-L.
"""

from typing import Any

from .entries import LanguageModel, NativeModel, TextSizes

#: Vision encoder of every LLaVA-style model of the paper, and its teacher.
VISION_MODEL = "google/siglip2-so400m-patch14-384"
TEACHER = "facebook/dinov2-large"

#: Configuration of :data:`VISION_MODEL`'s vision half: 27 x 27 patch tokens, no CLS token.
VISION_CONFIG: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def _by_key(models: list[Any]) -> dict[str, Any]:
    return {model.key: model for model in models}


LANGUAGE_MODELS: dict[str, LanguageModel] = _by_key(
    [
        LanguageModel(
            "qwen2_5_3b",
            "Qwen2.5-3B",
            "Qwen/Qwen2.5-3B-Instruct",
            TextSizes("qwen2", 36, 16, 2, 128, 2048, 11008, 151936, tied=True),
            151665,
            "llava_qwen2_5",
            "L3H4,L5H11,L5H14,L5H9,L5H15",
            3_085_938_688,
        ),
        LanguageModel(
            "qwen2_5_7b",
            "Qwen2.5-7B",
            "Qwen/Qwen2.5-7B-Instruct",
            TextSizes("qwen2", 28, 28, 4, 128, 3584, 18944, 152064),
            151665,
            "llava_qwen2_5",
            "L14H5,L4H7,L14H4,L4H10,L4H13",
            7_615_616_512,
        ),
        LanguageModel(
            "qwen2_5_14b",
            "Qwen2.5-14B",
            "Qwen/Qwen2.5-14B-Instruct",
            TextSizes("qwen2", 48, 40, 8, 128, 5120, 13824, 152064),
            151665,
            "llava_qwen2_5",
            "L13H27,L18H13,L0H9,L0H7,L3H8",
            14_770_033_664,
        ),
        LanguageModel(
            "qwen3_4b",
            "Qwen3-4B",
            "Qwen/Qwen3-4B-Instruct-2507",
            TextSizes("qwen3", 36, 32, 8, 128, 2560, 9728, 151936, tied=True),
            151669,
            "llava_qwen3",
            "L7H6,L13H12,L3H6,L3H5,L13H13",
            4_022_468_096,
        ),
        LanguageModel(
            "qwen3_8b",
            "Qwen3-8B",
            "Qwen/Qwen3-8B",
            TextSizes("qwen3", 36, 32, 8, 128, 4096, 12288, 151936),
            151669,
            "llava_qwen3",
            "L13H12,L7H6,L3H5,L13H13,L13H15",
            8_190_735_360,
        ),
        LanguageModel(
            "qwen3_14b",
            "Qwen3-14B",
            "Qwen/Qwen3-14B",
            TextSizes("qwen3", 40, 40, 8, 128, 5120, 17408, 151936),
            151669,
            "llava_qwen3",
            "L14H24,L9H36,L9H32,L1H37,L1H36",
            14_768_307_200,
        ),
        LanguageModel(
            "vicuna_7b",
            "Vicuna-7B",
            "lmsys/vicuna-7b-v1.5",
            TextSizes("llama", 32, 32, 32, 128, 4096, 11008, 32000),
            32000,
            "llava_vicuna",
            "L0H14,L1H1,L0H1,L0H3,L0H30",
            6_738_415_616,
        ),
        LanguageModel(
            "vicuna_13b",
            "Vicuna-13B",
            "lmsys/vicuna-13b-v1.5",
            TextSizes("llama", 40, 40, 40, 128, 5120, 13824, 32000),
            32000,
            "llava_vicuna",
            "L0H38,L1H0,L0H11,L0H10,L0H26",
            13_015_864_320,
        ),
        LanguageModel(
            "llama3_8b",
            "Llama3-8B",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            TextSizes("llama", 32, 32, 8, 128, 4096, 14336, 128256),
            128256,
            "llava_llama3",
            "L0H31,L2H21,L0H29,L2H23,L2H25",
            8_030_261_248,
        ),
    ]
)

NATIVE_MODELS: dict[str, NativeModel] = _by_key(
    [
        NativeModel(
            "qwen2_5_vl_7b",
            "Qwen2.5-VL-7B",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            "qwen2_5_vl",
            TextSizes(
                "qwen2_5_vl_text",
                28,
                28,
                4,
                128,
                3584,
                18944,
                152064,
                extra={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
            ),
            "qwen2_vl",
            "visual.merger",
            752,
            8_292_166_656,
            vision={
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "fullatt_block_indexes": [7, 15, 23, 31],
            },
        ),
        NativeModel(
            "qwen3_vl_4b",
            "Qwen3-VL-4B",
            "Qwen/Qwen3-VL-4B-Instruct",
            "qwen3_vl",
            TextSizes(
                "qwen3_vl_text",
                36,
                32,
                8,
                128,
                2560,
                9728,
                151936,
                tied=True,
                extra={"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}},
            ),
            "qwen3_vl_nothink",
            "visual.merger",
            576,
            4_437_815_808,
            vision={
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        ),
        NativeModel(
            "llava_1_5_7b",
            "LLaVA-1.5-7B",
            "llava-hf/llava-1.5-7b-hf",
            "llava",
            TextSizes("llama", 32, 32, 32, 128, 4096, 11008, 32064),
            "llava_vicuna",
            "multi_modal_projector",
            576,
            7_063_427_072,
        ),
        NativeModel(
            "llava_next_7b",
            "LLaVA-NeXT-7B (Mistral)",
            "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava_next",
            TextSizes("mistral", 32, 32, 8, 128, 4096, 14336, 32064, extra={"sliding_window": None}),
            "llava_next_mistral",
            "multi_modal_projector",
            2928,
            7_566_747_648,
        ),
        NativeModel(
            "internvl3_8b",
            "InternVL3-8B",
            "OpenGVLab/InternVL3-8B-hf",
            "internvl",
            TextSizes("qwen2", 28, 28, 4, 128, 3584, 18944, 151674),
            "intern_vl",
            "multi_modal_projector",
            256,
            7_944_373_760,
            vision={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": [448, 448],
                "patch_size": [14, 14],
                "attention_bias": True,
            },
        ),
        NativeModel(
            "gemma3_4b",
            "Gemma-3-4B",
            "google/gemma-3-4b-it",
            "gemma3",
            TextSizes("gemma3_text", 34, 8, 4, 256, 2560, 10240, 262208, tied=True),
            "gemma3",
            "multi_modal_projector",
            256,
            4_300_079_472,
            vision=VISION_CONFIG | {"image_size": 896},
        ),
    ]
)
