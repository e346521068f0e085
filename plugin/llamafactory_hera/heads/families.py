"""The attention heads of a transformers model: the text decoder, its layers, and their output projections.

To support a new architecture whose layers follow the usual layout, add its name to ``FAMILIES``. In this layout, the
input of ``layer.self_attn.o_proj`` is the concatenation of the heads, with ``head_dim`` values each. Some models
change the attention's output before adding it to the residual stream: Gemma 2 and 3, GLM-4 and OLMo 2 normalize the
output, and Granite scales it. A head's contribution is read before that change, at the projection.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

#: The ``model_type`` of text configurations whose decoder layers have the usual layout.
FAMILIES = frozenset({
    "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_oss", "granite", "llama", "llama4_text", "ministral",
    "ministral3", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3",
    "qwen3_moe", "qwen3_vl_text", "smollm3",
})  # fmt: skip

#: The layer number that denotes the output of the norm after the last layer.
FINAL = sys.maxsize


@dataclass(frozen=True)
class HeadLayout:
    """The sizes of a text decoder's attention heads, from its configuration."""

    model_type: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int


def head_layout(config: Any) -> HeadLayout:
    """Reads the head layout from a model's configuration; raises ``ValueError`` if its type is unsupported."""
    text = config.get_text_config()
    if text.model_type not in FAMILIES:
        raise ValueError(
            f"model: the text model type {text.model_type!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}. If the input of its output projections is the concatenation of the "
            "heads, add the type to FAMILIES in heads/families.py."
        )
    n_heads = text.num_attention_heads
    return HeadLayout(
        model_type=text.model_type,
        n_layers=text.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        # the value in the configuration comes first, because it may differ from hidden_size / n_heads
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        hidden_size=text.hidden_size,
    )


def media_token_ids(config: Any) -> frozenset[int]:
    """Returns the ids of image and video placeholders in ``input_ids``; empty for a language model."""
    keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = (getattr(config, key, None) for key in keys)
    return frozenset(i for i in ids if isinstance(i, int))


def text_decoder(model: nn.Module) -> nn.Module:
    """Finds the text decoder, the module with the layers and the final norm, even under PEFT, DDP and FSDP."""
    from torch.nn import ModuleList

    layout = head_layout(model_config(model))
    # Wrappers such as FSDP and PEFT forward attribute access, so several modules may expose the same layers; the dict
    # keeps the innermost of these modules.
    found: dict[nn.ModuleList, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        layers, kind = getattr(module, "layers", None), getattr(getattr(module, "config", None), "model_type", None)
        if kind == layout.model_type and isinstance(layers, ModuleList) and len(layers) == layout.n_layers:
            found[layers] = (name, module)
    if len(found) != 1:
        names = ", ".join(name for name, _ in found.values()) or "none"
        raise ValueError(
            f"model: {type(model).__name__} must contain one text decoder of type {layout.model_type!r} with "
            f"{layout.n_layers} layers, but contains {names}; use another model."
        )
    return next(iter(found.values()))[1]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of the text decoder in order, and checks that each projects all heads together."""
    layout, layers = head_layout(model_config(model)), list(text_decoder(model).layers)  # type: ignore[arg-type]
    width = layout.n_heads * layout.head_dim
    for index, layer in enumerate(layers):
        projection = getattr(getattr(layer, "self_attn", None), "o_proj", None)
        if projection is None or getattr(projection, "in_features", width) != width:
            raise ValueError(
                f"model: layer {index} of this {layout.model_type!r} model has no self_attn.o_proj that takes "
                f"{layout.n_heads} heads of {layout.head_dim}; use another model."
            )
    return layers


def model_config(model: nn.Module) -> Any:
    """Returns the configuration of the outermost transformers model inside ``model``."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            return config
    raise ValueError(f"model: {type(model).__name__} contains no transformers model; pass one.")


def attention_module(layer: nn.Module) -> nn.Module:
    """Returns the attention module of a decoder layer."""
    return layer.self_attn  # type: ignore[return-value]


def output_projection(layer: nn.Module) -> nn.Module:
    """Returns the ``o_proj`` of a decoder layer; under PEFT, the adapter layer around it."""
    return attention_module(layer).o_proj  # type: ignore[return-value]


def trainable_upstream(model: nn.Module, layer: int, whole_layer: bool = False) -> list[str]:
    """Lists the trainable parameters that influence the heads of a layer or, with ``whole_layer``, the layer's output.

    These are all parameters before the layer (vision tower, projector, embeddings, earlier layers) and, inside the
    layer, those of the input norm and the attention, or all. ``layer`` may be :data:`FINAL`. Call this function before
    a sharding engine renames or flattens parameters.
    """
    layers, final_norm = decoder_layers(model), text_decoder(model).norm
    feeding: list[Any] = [final_norm]
    if layer != FINAL:
        names = ("input_layernorm", "self_attn")  # OLMo 2 has no input_layernorm
        inside = [part for name, part in layers[layer].named_children() if name in names]
        feeding = [layers[layer]] if whole_layer else inside
    outermost: Any = next(m for m in model.modules() if hasattr(m, "get_output_embeddings"))
    # tied embeddings are used both before and after the decoder
    feeding.append(outermost.get_input_embeddings())
    after = _parameter_ids([*layers[layer:], final_norm, outermost.get_output_embeddings()]) - _parameter_ids(feeding)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in after]


def _parameter_ids(modules: list[Any]) -> set[int]:
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
