"""Finds the heads of a transformers model: its text decoder, and each layer's token mixer and output projection.

The layout is found by structure: the heads of a decoder layer lie side by side in the input of its mixer's output
projection. A head's contribution is read at the projection. At that point, Qwen3.5 has multiplied the heads by a gate,
but Gemma 2 and 3, GLM-4 and OLMo 2 have not yet normalized the attention's output, nor has Granite scaled it.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import nn

#: The ``model_type`` of each text decoder that the tests build; other decoders are accepted if their structure fits.
FAMILIES = frozenset({
    "aria_text", "cohere2", "deepseek_v3", "ernie4_5_vl_moe_text", "exaone4", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "glm4", "glm4_moe", "glm4v_moe_text", "glm4v_text", "glm_ocr_text", "gpt_oss",
    "granite", "lfm2", "llama", "llama4_text", "ministral", "ministral3", "mistral", "mistral4", "mixtral",
    "molmo2_text", "olmo2", "olmo3", "paddleocr_vl_text", "phi3", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text",
    "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_vl_text", "smollm3",
})  # fmt: skip

#: The layer number that denotes the output of the norm after the last layer.
FINAL = sys.maxsize

Mixer = Literal["attention", "linear_attention", "none"]

# These tuples list possible names of a mixer's output projection, its head width (with latent attention, the width of
# the values) and its number of heads, of the modules before the mixer, and of the norm after the last layer.
_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")
_WIDTHS = ("v_head_dim", "head_v_dim", "head_dim")
_COUNTS = ("num_heads", "num_attention_heads", "num_v_heads")
_BEFORE_MIXER = ("input_layernorm", "operator_norm", "self_attn_layer_norm", "altup")
_FINAL_NORMS = ("norm", "embedding_norm", "final_layernorm", "final_layer_norm", "layer_norm")


class LayerHeads(NamedTuple):
    """The heads of one decoder layer; a layer without heads, such as a convolution, has the mixer ``none``."""

    mixer: Mixer = "none"
    n_heads: int = 0
    head_dim: int = 0
    projection: str = ""  #: The path of the output projection in the layer, such as ``self_attn.o_proj``.

    def __str__(self) -> str:
        if not self.n_heads:
            return "a layer without heads"
        article = "an" if self.mixer == "attention" else "a"
        return f"{article} {self.mixer.replace('_', '-')} layer with {self.n_heads} heads of {self.head_dim}"


@dataclass(frozen=True)
class HeadLayout:
    """The heads of a text decoder, layer by layer."""

    model_type: str
    hidden_size: int
    layers: tuple[LayerHeads, ...]

    @property
    def n_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """The largest number of heads in a layer."""
        return max(layer.n_heads for layer in self.layers)

    @property
    def head_dim(self) -> int:
        """The width of the heads; raises ``ValueError`` if the layers differ in the number or width of their heads."""
        first = self.layers[0]
        if any((layer.n_heads, layer.head_dim) != (first.n_heads, first.head_dim) for layer in self.layers):
            kinds = "; ".join(sorted(set(map(str, self.layers))))
            raise ValueError(
                f"model: the layers of this {self.model_type!r} model have different heads ({kinds}), but this method "
                "needs equal heads; use another model."
            )
        return first.head_dim


_LAYOUTS: dict[str, HeadLayout] = {}


def head_layout(config: Any) -> HeadLayout:
    """Reads the layout from a configuration, without weights; raises ``ValueError`` for a model without heads."""
    key = config.to_json_string(use_diff=False)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _read_layout(config)
    return _LAYOUTS[key]


def _read_layout(config: Any) -> HeadLayout:
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not hasattr(text, "vocab_size"):
        kind = "an encoder-decoder" if hasattr(text, "vocab_size") else "not a language model"
        raise ValueError(f"model: {config.model_type!r} is {kind}, but HeRA reads decoders; use a decoder-only model.")
    layers = tuple(_layer_heads(layer, text, index) for index, layer in enumerate(_empty_decoder(config).layers))
    if not any(layer.n_heads for layer in layers):
        raise ValueError(
            f"model: no layer of the text model type {text.model_type!r} has an output projection whose input is the "
            f"concatenation of its heads ({', '.join(_PROJECTIONS)}, with {' or '.join(_WIDTHS)}); use another model."
        )
    return HeadLayout(text.model_type, text.hidden_size, layers)


def _empty_decoder(config: Any) -> Any:
    """Builds a text decoder on the meta device, alone or, if it has no class of its own, inside its model."""
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING

    text, problems = config.get_text_config(), []
    for part, classes in ((text, MODEL_MAPPING), (config, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)):
        if type(part) not in classes:
            continue
        part = copy.deepcopy(part)
        part._attn_implementation = "eager"  # other implementations may need packages that are not installed
        try:
            with torch.device("meta"):
                # not from_config, which would shard the model under ZeRO-3
                build: Any = classes[type(part)]
                return find_decoder(build(part), text.model_type, text.num_hidden_layers)
        except Exception as error:  # a model may need real values to be built
            problems.append(f" ({error})")
    raise ValueError(
        f"model: the text model type {text.model_type!r} cannot be built from its configuration"
        f"{''.join(problems[-1:])}; use a model whose class is part of the installed transformers."
    )


def _layer_heads(layer: nn.Module, text: Any, index: int) -> LayerHeads:
    found: list[LayerHeads] = []
    types = getattr(text, "layer_types", None) or ()
    linear = index < len(types) and "linear" in types[index]
    for name, mixer in layer.named_children():
        projection = next((key for key in _PROJECTIONS if hasattr(getattr(mixer, key, None), "in_features")), "")
        width = next((size for key in _WIDTHS if isinstance(size := getattr(mixer, key, None), int)), 0)
        if not (projection and width) or "cross" in name:
            continue
        n_heads, rest = divmod(getattr(mixer, projection).in_features, width)
        counts = [count for key in _COUNTS if isinstance(count := getattr(mixer, key, None), int)]
        if not rest and n_heads in (counts or (n_heads,)):
            kind: Mixer = "linear_attention" if linear or "Attention" not in type(mixer).__name__ else "attention"
            found.append(LayerHeads(kind, n_heads, width, f"{name}.{projection}"))
    # If a layer has two mixers, attention is preferred.
    return min(found, key=lambda heads: heads.mixer, default=LayerHeads())


def media_token_ids(config: Any) -> frozenset[int]:
    """Returns the ids of image and video placeholders in ``input_ids``; empty for a language model."""
    keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = (getattr(config, key, None) for key in keys)
    return frozenset(i for i in ids if isinstance(i, int))


def text_decoder(model: nn.Module) -> nn.Module:
    """Finds the text decoder, the module with the layers and the final norm, even under PEFT, DDP and FSDP."""
    text = model_config(model).get_text_config()
    return find_decoder(model, text.model_type, text.num_hidden_layers)


def find_decoder(model: nn.Module, model_type: str, n_layers: int) -> nn.Module:
    """Finds the only module of a type with ``n_layers`` layers; raises ``ValueError`` if there are none or several."""
    from torch.nn import ModuleList

    # Wrappers such as FSDP and PEFT forward attribute access, so several modules may expose the same layers. The
    # dictionary keeps the innermost one.
    found: dict[nn.ModuleList, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        layers, kind = getattr(module, "layers", None), getattr(getattr(module, "config", None), "model_type", None)
        if kind == model_type and isinstance(layers, ModuleList) and len(layers) == n_layers:
            found[layers] = (name, module)
    if len(found) != 1:
        names = ", ".join(name for name, _ in found.values()) or "none"
        raise ValueError(
            f"model: {type(model).__name__} must contain one text decoder of type {model_type!r} with {n_layers} "
            f"layers, but contains {names}; use another model."
        )
    return next(iter(found.values()))[1]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of the text decoder in order."""
    return list(text_decoder(model).layers)  # type: ignore[arg-type]


def final_norm(decoder: nn.Module) -> nn.Module:
    """Returns the norm after the last layer of a text decoder."""
    for name in _FINAL_NORMS:
        if (norm := getattr(decoder, name, None)) is not None:
            return norm
    raise ValueError(f"model: {type(decoder).__name__} has no norm after its last layer; use another model.")


def model_config(model: nn.Module) -> Any:
    """Returns the configuration of the outermost transformers model inside ``model``."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            return config
    raise ValueError(f"model: {type(model).__name__} contains no transformers model; pass a model from transformers.")


def output_projection(layer: nn.Module, heads: LayerHeads) -> nn.Module:
    """Returns the output projection of a decoder layer's heads; under PEFT, the adapter layer around it."""
    return reduce(getattr, heads.projection.split("."), layer)


def trainable_upstream(model: nn.Module, layer: int, whole_layer: bool = False) -> list[str]:
    """Lists the trainable parameters that influence the heads of a layer or, with ``whole_layer``, the layer's output.

    Inside the layer, only these count: the input norm and the mixer or, with ``whole_layer``, all modules.
    ``layer`` may be ``FINAL``. Call this function before a sharding engine renames or flattens parameters.
    """
    layers, norm = decoder_layers(model), final_norm(text_decoder(model))
    feeding: list[Any] = [norm]
    if layer != FINAL:
        mixer = head_layout(model_config(model)).layers[layer].projection.split(".")[0]
        names = (*_BEFORE_MIXER, mixer)  # OLMo 2 has no input norm
        inside = [part for name, part in layers[layer].named_children() if name in names]
        feeding = [layers[layer]] if whole_layer else inside
    outermost: Any = next(m for m in model.modules() if hasattr(m, "get_output_embeddings"))
    # tied embeddings are used both before and after the decoder
    feeding.append(outermost.get_input_embeddings())
    after = _parameter_ids([*layers[layer:], norm, outermost.get_output_embeddings()]) - _parameter_ids(feeding)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in after]


def _parameter_ids(modules: list[Any]) -> set[int]:
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}
