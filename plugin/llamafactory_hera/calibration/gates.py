"""Gates on head outputs, through which CAF takes its gradients (RAH-LoRA, text above eq. 5)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..heads.families import decoder_layers, head_layout, model_config, output_projection


class HeadGates:
    """Multiplies each head's output by a gate of 1 while it is entered, one gate for each sample and head::

        with HeadGates(model) as gates:
            gates.reset(batch_size)
            gradients = gates.gradients(loss(model(**batch)))

    A head's output is its slice of the output projection's input. Weights are frozen meanwhile, so that autograd
    keeps nothing for them: the gates alone have gradients. Samples do not mix, so that the gradient of a sum of
    losses with respect to a sample's gate is that of its own loss.

    Args:
        model: A transformers model, bare, whole on this process.

    Raises:
        ValueError: Unknown architecture.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layout = head_layout(model_config(model))
        self._layers = decoder_layers(model)
        self._parameters = list(model.parameters())
        self._trained: list[nn.Parameter] = []
        self._gates: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "HeadGates":
        self._trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for index, layer in enumerate(self._layers):
            projection = output_projection(layer, self._layout.model_type)
            self._handles.append(projection.register_forward_pre_hook(self._gate(index)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._gates.clear()

    def reset(self, batch_size: int) -> None:
        """Makes new gates for a forward pass of ``batch_size`` samples."""
        device = self._parameters[0].device
        self._gates = [
            torch.ones(batch_size, self._layout.n_heads, device=device, requires_grad=True) for _ in self._layers
        ]

    def gradients(self, losses: Tensor) -> Tensor:
        """Gradients of each sample's loss with respect to its gates.

        Args:
            losses: ``[B]``.

        Returns:
            ``[B, L, H]`` in fp32.
        """
        return torch.stack(torch.autograd.grad(losses.sum(), self._gates), dim=1)

    def _gate(self, index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            outputs, *rest = inputs
            heads = outputs.unflatten(-1, (self._layout.n_heads, self._layout.head_dim))
            gates = self._gates[index][:, None, :, None].to(outputs.dtype)
            return ((heads * gates).flatten(-2), *rest)

        return hook
