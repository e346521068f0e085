"""Which heads look across text and image, and which decide what the model is sure of: I-SAL and CAF (section 3.2)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.families import attention_module, decoder_layers, head_layout, model_config, output_projection
from ..heads.hooks import Hooks

# -- I-SAL, eq. 3 ----------------------------------------------------------------------------------------------------


def attention_flow(attention: Tensor, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention between text and image in both directions (eq. 3), and from text to each image token.

    Under a causal mask an image token sees only the text in front of it; the image-to-text half is kept as the paper
    has it.

    Args:
        attention: One sample's weights ``[H, T, T]``, queries before keys.
        text: Positions of its text tokens.
        image: Positions of its image tokens.

    Returns:
        ``r`` of eq. 3 ``[H]``, and ``A^{T->I}`` of eq. 10, the mean over text tokens, ``[H, n_image]``; in fp32.
    """
    to_image = attention[:, text][:, :, image].float()
    to_text = attention[:, image][:, :, text].float()
    return (to_image.mean(dim=(1, 2)) + to_text.mean(dim=(1, 2))) / 2, to_image.mean(dim=1)


def resize_map(attention_map: Tensor, size: int) -> Tensor:
    """An attention map over image tokens, in raster order, with ``size`` bins that keep its mass.

    Models with images of several resolutions give maps of several lengths, and their average needs one: ``[H,
    n_image]`` becomes ``[H, size]``, where ``size`` is at most ``n_image``.
    """
    length = attention_map.shape[-1]
    return torch.nn.functional.adaptive_avg_pool1d(attention_map, size) * (length / size)


class AttentionFlow(Hooks):
    """Captures :func:`attention_flow` of every head while it is entered::

        with AttentionFlow(model, bins) as flow, torch.no_grad():
            flow.expect(text, image)
            model(**batch)
            saliency, maps = flow.take()

    Meanwhile the text decoder computes attention by its own eager implementation, whose weights each layer hands out:
    they are reduced there and then, and no second layer's ``[B, H, T, T]`` is ever held.

    Args:
        model: A transformers model, bare, whole on this process.
        bins: Length of the maps; at most the image tokens of any sample.
    """

    def __init__(self, model: nn.Module, bins: int) -> None:
        super().__init__()
        layout = head_layout(model_config(model))
        self._attentions = [attention_module(layer, layout.model_type) for layer in decoder_layers(model)]
        self._text_config, self._bins = model_config(model).get_text_config(), bins
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def remove(self) -> None:
        """Gives the model its own attention back and forgets what was captured."""
        super().remove()
        self._found.clear()

    def expect(self, text: Tensor, image: Tensor) -> None:
        """Says which tokens of the next forward pass are text and which are image, boolean ``[B, T]`` each."""
        self._samples = [(t.nonzero().flatten(), i.nonzero().flatten()) for t, i in zip(text, image, strict=True)]
        self._found.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """``r`` of eq. 3 ``[B, L, H]`` and the maps of eq. 10 ``[B, L, H, bins]`` of the last pass, in fp32."""
        layers = [self._found.pop(index) for index in range(len(self._attentions))]
        by_layer = [[torch.stack(kind) for kind in zip(*samples, strict=True)] for samples in layers]
        flows, maps = zip(*by_layer, strict=True)
        return torch.stack(flows, dim=1), torch.stack(maps, dim=1)

    def _hook(self) -> None:
        # masks are made for the implementation that the configuration names
        configs = {id(config): config for config in (self._text_config, *(a.config for a in self._attentions))}
        for config in configs.values():
            self._undo.append(partial(setattr, config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = "eager"
        for index, attention in enumerate(self._attentions):
            self._undo.append(attention.register_forward_hook(self._after(index)).remove)

    def _after(self, index: int) -> Callable[..., None]:
        def hook(attention: nn.Module, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
            weights = output[1]
            if weights is None:
                raise RuntimeError(f"{type(attention).__name__} handed out no attention weights.")
            flows = [attention_flow(sample, *kinds) for sample, kinds in zip(weights, self._samples, strict=True)]
            self._found[index] = [(flow, resize_map(maps, self._bins)) for flow, maps in flows]

        return hook


# -- CAF, eq. 5 ------------------------------------------------------------------------------------------------------


def margin_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """The label-free margin loss of each sample, ``-1/T sum_t log(p_t1 / p_t2)`` (text under eq. 5).

    The log ratio of two probabilities of one softmax is the difference of their logits, so no softmax is computed.

    Args:
        logits: ``[B, T, V]``.
        positions: The tokens ``t``, boolean ``[B, T]``; at least one in each row.

    Returns:
        ``[B]`` in fp32; 0 or less.
    """
    top = torch.topk(logits, 2, dim=-1).values.float()
    margin = (top[..., 0] - top[..., 1]).masked_fill(~positions, 0)
    return -margin.sum(dim=1) / positions.sum(dim=1)


class HeadGates(Hooks):
    """Multiplies each head's output by a gate of 1 while it is entered, one gate for each sample and head::

        with HeadGates(model) as gates:
            gates.reset(batch_size)
            gradients = gates.gradients(loss(model(**batch)))

    A head's output is its slice of the output projection's input. Weights are frozen meanwhile, so that autograd
    keeps nothing for them. Samples do not mix, so that the gradient of a sum of losses with respect to a sample's
    gate is that of its own loss. The model is bare and whole on this process.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._layout = head_layout(model_config(model))
        self._projections = [output_projection(layer, self._layout.model_type) for layer in decoder_layers(model)]
        self._parameters = list(model.parameters())
        self._gates: list[Tensor] = []

    def remove(self) -> None:
        """Takes the gates away; weights that were trained are trained again."""
        super().remove()
        self._gates.clear()

    def reset(self, batch_size: int) -> None:
        """Makes new gates for a forward pass of ``batch_size`` samples."""
        shape, device = (batch_size, self._layout.n_heads), self._parameters[0].device
        self._gates = [torch.ones(shape, device=device, requires_grad=True) for _ in self._projections]

    def gradients(self, losses: Tensor) -> Tensor:
        """Gradients of each sample's loss ``[B]`` with respect to its gates, ``[B, L, H]`` in fp32."""
        return torch.stack(torch.autograd.grad(losses.sum(), self._gates), dim=1)

    def _hook(self) -> None:
        for parameter in self._parameters:
            if parameter.requires_grad:
                self._undo.append(partial(setattr, parameter, "requires_grad", True))
                parameter.requires_grad_(False)
        for index, projection in enumerate(self._projections):
            self._undo.append(projection.register_forward_pre_hook(self._gate(index)).remove)

    def _gate(self, index: int) -> Callable[..., tuple[Any, ...]]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            outputs, *rest = inputs
            heads = outputs.unflatten(-1, (self._layout.n_heads, self._layout.head_dim))
            gates = self._gates[index][:, None, :, None].to(outputs.dtype)
            return ((heads * gates).flatten(-2), *rest)

        return hook
