"""The weight slices of single heads: which rows of the value and which columns of the output projection are whose."""

from typing import Literal

import torch
from torch import Tensor, nn

from ..heads.families import attention_module, decoder_layers, head_layout, model_config, output_projection
from ..heads.targets import Target

#: The value rows of a key-value head, or the output columns of a query head.
Part = Literal["value", "output"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_VALUE = "v_proj"


class HeadWeights:
    """Views of a model's weights by head, and the names of the projections that hold them.

    Under grouped-query attention ``v_proj`` holds one block of rows for each key-value head, which a group of query
    heads shares; ``o_proj`` holds one block of columns for each query head.

    Args:
        model: A transformers model, bare, whole on this process.

    Raises:
        ValueError: Unknown architecture, a fused or otherwise unusual layout, or quantised weights; says why.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layout = head_layout(model_config(model))
        names = {id(module): name for name, module in model.named_modules()}
        self._modules: dict[tuple[int, Part], nn.Linear] = {}
        self._names: dict[tuple[int, Part], str] = {}
        for index, layer in enumerate(decoder_layers(model)):
            attention = attention_module(layer, self.layout.model_type)
            found = {
                "value": getattr(attention, _VALUE, None),
                "output": output_projection(layer, self.layout.model_type),
            }
            for part, module in found.items():
                self._check(module, part)
                self._modules[index, part] = module
                self._names[index, part] = names[id(module)]

    @property
    def group_size(self) -> int:
        """Query heads that share a value block; 1 is multi-head attention."""
        return self.layout.n_heads // self.layout.n_kv_heads

    def kv_head(self, head: Target) -> int:
        """The key-value head that serves a query head."""
        return head.head // self.group_size

    def group(self, head: Target) -> list[Target]:
        """All query heads that share a head's value block, itself included."""
        first = self.kv_head(head) * self.group_size
        return [Target(head.layer, first + offset) for offset in range(self.group_size)]

    def name(self, layer: int, part: Part) -> str:
        """The name of a projection inside the model."""
        return self._names[layer, part]

    def shape(self, layer: int, part: Part) -> torch.Size:
        """The shape of a projection's whole weight."""
        return self._modules[layer, part].weight.shape

    def block(self, part: Part, index: int) -> slice:
        """Rows of the value projection of a key-value head, or columns of the output projection of a query head."""
        return slice(index * self.layout.head_dim, (index + 1) * self.layout.head_dim)

    def slice(self, layer: int, part: Part, index: int) -> Tensor:
        """The weights themselves: ``[d, D]`` of a key-value head's value, ``[D, d]`` of a query head's output."""
        weight = self._modules[layer, part].weight.detach()
        block = self.block(part, index)
        return weight[block] if part == "value" else weight[:, block]

    def of_head(self, head: Target) -> tuple[Tensor, Tensor]:
        """Value and output slice of a query head, the former of its key-value head."""
        return self.slice(head.layer, "value", self.kv_head(head)), self.slice(head.layer, "output", head.head)

    def _check(self, module: nn.Module | None, part: Part) -> None:
        layout = self.layout
        if module is None:
            raise ValueError(
                f"model_name_or_path: layers of type {layout.model_type!r} have no {_VALUE}: queries, keys and values "
                "are one fused matrix, which calibration does not slice. Use a model with separate projections."
            )
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.dtype not in _FLOATS:
            stored = f" of {weight.dtype}" if isinstance(weight, Tensor) else ""
            raise ValueError(
                f"model_name_or_path: its projections are {type(module).__name__}{stored}: the weights are quantised "
                "or wrapped, and calibration compares and changes plain ones. Calibrate the base model without "
                "quantization_bit (the adapter then loads on the quantised one, too), or dequantise the checkpoint."
            )
        heads = layout.n_kv_heads if part == "value" else layout.n_heads
        width = weight.shape[0] if part == "value" else weight.shape[1]
        if width != heads * layout.head_dim:
            raise ValueError(
                f"model_name_or_path: a {part} projection is {width} wide, and {heads} heads of {layout.head_dim} "
                f"values need {heads * layout.head_dim}: it is not laid out head by head. Use another model."
            )
