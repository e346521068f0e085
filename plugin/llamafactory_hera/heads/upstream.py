"""Which trainable parameters can change a head or a layer: the check that a HeRA run is not a silent no-op."""

from collections.abc import Collection

from torch import nn

from .families import FAMILIES, decoder_layers, head_layout, model_config


def trainable_upstream(model: nn.Module, layer: int, whole_layer: bool = False) -> list[str]:
    """Names of the trainable parameters that feed the attention output of decoder layer ``layer``, or the layer's own.

    That is everything before the layer (vision tower, projector, embeddings, earlier layers) and, inside it, the
    input norm and the attention, or all of it. Call it before a sharding engine renames or flattens parameters.

    Args:
        model: A transformers model, bare or under PEFT.
        layer: Zero-based index of the decoder layer.
        whole_layer: The layer's output is meant, not that of its attention.
    """
    family = FAMILIES[head_layout(model_config(model)).model_type]
    layers = decoder_layers(model)
    inside = (
        [layers[layer]] if whole_layer else [getattr(layers[layer], n) for n in (family.input_norm, family.attention)]
    )
    feeding = {id(p) for module in inside for p in module.parameters()}
    behind = {id(p) for later in layers[layer:] for p in later.parameters()} - feeding
    behind |= _behind_the_decoder(model, layers)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in behind]


def _behind_the_decoder(model: nn.Module, layers: Collection[nn.Module]) -> set[int]:
    decoder = next(m for m in model.modules() if list(getattr(m, "layers", None) or []) == list(layers))
    outermost = next(m for m in model.modules() if hasattr(m, "get_output_embeddings"))
    final = [getattr(decoder, "norm", None), outermost.get_output_embeddings()]
    parameters = {id(p) for module in final if module is not None for p in module.parameters()}
    # tied embeddings are both in front and behind
    return parameters - {id(p) for p in outermost.get_input_embeddings().parameters()}
