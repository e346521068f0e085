"""The table of backbones. The recipes, the training templates and the web UI's list of models are made from it.

The heads are those of the paper (arXiv 2606.23885, table 5), selected with DINOv2-L as teacher, least aligned first.
"""

from dataclasses import dataclass

#: The vision encoder and the teacher of all LLaVA-style models of the paper.
VISION_MODEL = "google/siglip2-so400m-patch14-384"
TEACHER = "facebook/dinov2-large"


@dataclass(frozen=True)
class Backbone:
    """A finished VLM, or the LLM that a LLaVA-style model is built on."""

    key: str  # prefix of the names of its recipes
    title: str
    checkpoint: str  # hub id
    template: str  # training template; for a LLaVA-style model that of stage 2
    heads: str = ""  # a value of ``hera_heads``; empty for models that the paper does not use


def _by_key(*backbones: Backbone) -> dict[str, Backbone]:
    return {backbone.key: backbone for backbone in backbones}


# fmt: off
#: The LLMs of the paper. `build` combines each with :data:`VISION_MODEL`.
LANGUAGE_MODELS = _by_key(
    Backbone("qwen2_5_3b", "Qwen2.5-3B", "Qwen/Qwen2.5-3B-Instruct", "llava_qwen2_5", "L3H4,L5H11,L5H14,L5H9,L5H15"),
    Backbone("qwen2_5_7b", "Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "llava_qwen2_5", "L14H5,L4H7,L14H4,L4H10,L4H13"),
    Backbone("qwen2_5_14b", "Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct", "llava_qwen2_5",
             "L13H27,L18H13,L0H9,L0H7,L3H8"),
    Backbone("qwen3_4b", "Qwen3-4B", "Qwen/Qwen3-4B-Instruct-2507", "llava_qwen3", "L7H6,L13H12,L3H6,L3H5,L13H13"),
    Backbone("qwen3_8b", "Qwen3-8B", "Qwen/Qwen3-8B", "llava_qwen3", "L13H12,L7H6,L3H5,L13H13,L13H15"),
    Backbone("qwen3_14b", "Qwen3-14B", "Qwen/Qwen3-14B", "llava_qwen3", "L14H24,L9H36,L9H32,L1H37,L1H36"),
    Backbone("vicuna_7b", "Vicuna-7B", "lmsys/vicuna-7b-v1.5", "llava_vicuna", "L0H14,L1H1,L0H1,L0H3,L0H30"),
    Backbone("vicuna_13b", "Vicuna-13B", "lmsys/vicuna-13b-v1.5", "llava_vicuna", "L0H38,L1H0,L0H11,L0H10,L0H26"),
    Backbone("llama3_8b", "Llama3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "llava_llama3",
             "L0H31,L2H21,L0H29,L2H23,L2H25"),
)

#: Finished VLMs, which are trained without `build`.
NATIVE_MODELS = _by_key(
    Backbone("qwen2_5_vl_7b", "Qwen2.5-VL-7B", "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_vl"),
    Backbone("qwen3_vl_4b", "Qwen3-VL-4B", "Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl_nothink"),
    Backbone("llava_1_5_7b", "LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf", "llava_vicuna"),
    Backbone("llava_next_7b", "LLaVA-NeXT-7B (Mistral)", "llava-hf/llava-v1.6-mistral-7b-hf", "llava_next_mistral"),
    Backbone("internvl3_8b", "InternVL3-8B", "OpenGVLab/InternVL3-8B-hf", "intern_vl"),
    Backbone("gemma3_4b", "Gemma-3-4B", "google/gemma-3-4b-it", "gemma3"),
)
# fmt: on

#: The training templates of LLaVA-style models, first the one of stage 1.
TEMPLATES = ("llava_plain", *dict.fromkeys(model.template for model in LANGUAGE_MODELS.values()))
