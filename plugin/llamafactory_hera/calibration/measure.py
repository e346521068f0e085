"""Which heads look across text and image, and which decide what the model is sure of: I-SAL and CAF (section 3.2)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from ..heads.families import attention_module, decoder_layers, head_layout, model_config, output_projection
from ..heads.hooks import Hooks
from ..heads.pooling import Pooling
from ..selection.forward import Forward
from .settings import Positions

_POOLINGS: dict[Positions, Pooling] = {"text": "text", "all": "mean", "last": "last"}

# -- I-SAL, eq. 3 ----------------------------------------------------------------------------------------------------


def attention_flow(attention: Tensor, text: Tensor, image: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Mean attention between text and image in both directions (eq. 3), and from text to each image token.

    Under a causal mask an image token sees only the text in front of it; the image-to-text half is kept as the paper
    has it. Images of several resolutions give maps of several lengths, and their average needs one: neighbouring
    tokens, in raster order, share a bin.

    Args:
        attention: One sample's weights ``[H, T, T]``, queries before keys.
        text: Positions of its text tokens.
        image: Positions of its image tokens.
        bins: Length of the map; at most the image tokens.

    Returns:
        ``r`` of eq. 3 ``[H]``, and ``A^{T->I}`` of eq. 10, the mean over text tokens, ``[H, bins]``; in fp32.
    """
    to_image = attention[:, text][:, :, image].float()
    to_text = attention[:, image][:, :, text].float()
    maps = adaptive_avg_pool1d(to_image.mean(dim=1), bins) * (len(image) / bins)
    return (to_image.mean(dim=(1, 2)) + to_text.mean(dim=(1, 2))) / 2, maps


class AttentionFlow(Hooks):
    """Reads :func:`attention_flow` of every head while it is entered.

    Meanwhile the text decoder computes attention by its own eager implementation, whose weights each layer hands out:
    they are reduced there and then, and no second layer's ``[B, H, T, T]`` is ever held.

    Args:
        forward: Around a transformers model, bare, whole on this process.
        bins: Length of the maps; at most the image tokens of any sample.
    """

    def __init__(self, forward: Forward, bins: int) -> None:
        super().__init__()
        config = model_config(forward.model)
        self._forward, self._bins, self._text_config = forward, bins, config.get_text_config()
        layers = decoder_layers(forward.model)
        self._attentions = [attention_module(layer, head_layout(config).model_type) for layer in layers]
        self._tokens: list[tuple[Tensor, Tensor]] = []
        self._layers: list[list[tuple[Tensor, Tensor]]] = []

    @torch.no_grad()
    def read(self, batch: dict[str, Any]) -> list[tuple[Tensor, ...]]:
        """``r`` of eq. 3 ``[L, H]`` and the map of eq. 10 ``[L, H, bins]`` of each sample, in fp32 on the CPU."""
        text = self._forward.tokens("text", batch)
        image = self._forward.tokens("mean", batch) & ~text
        self._tokens = [(t.nonzero().flatten(), i.nonzero().flatten()) for t, i in zip(text, image, strict=True)]
        self._layers.clear()
        self._forward.run(batch)
        samples = zip(*self._layers, strict=True)
        return [tuple(torch.stack(kind).cpu() for kind in zip(*layers, strict=True)) for layers in samples]

    def _hook(self) -> None:
        # masks are made for the implementation that the configuration names
        configs = {id(config): config for config in (self._text_config, *(a.config for a in self._attentions))}
        for config in configs.values():
            self._undo.append(partial(setattr, config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = "eager"
        self._undo += [attention.register_forward_hook(self._reduce).remove for attention in self._attentions]

    def _reduce(self, attention: nn.Module, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
        weights = output[1]
        if weights is None:
            raise RuntimeError(f"{type(attention).__name__} handed out no attention weights.")
        samples = zip(weights, self._tokens, strict=True)
        self._layers.append([attention_flow(sample, *tokens, self._bins) for sample, tokens in samples])


# -- CAF, eq. 5 ------------------------------------------------------------------------------------------------------


def counted_logits(forward: Forward, batch: dict[str, Any], positions: Positions) -> tuple[Tensor, Tensor]:
    """Logits at the tokens that count in any sample of a batch.

    Returns:
        Logits ``[B, P, V]`` and the tokens among them that count in each sample, boolean ``[B, P]``.
    """
    counted = forward.tokens(_POOLINGS[positions], batch)
    kept = counted.any(dim=0).nonzero().flatten()
    return forward.logits(batch, kept), counted[:, kept]


def margin_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """The label-free margin loss of each sample, ``-1/T sum_t log(p_t1 / p_t2)`` (text under eq. 5).

    The log ratio of two probabilities of one softmax is the difference of their logits, so no softmax is computed.

    Args:
        logits: ``[B, T, V]``.
        counted: The tokens ``t``, boolean ``[B, T]``; at least one in each row.

    Returns:
        ``[B]`` in fp32; 0 or less.
    """
    top = torch.topk(logits, 2, dim=-1).values.float()
    margin = (top[..., 0] - top[..., 1]).masked_fill(~counted, 0)
    return -margin.sum(dim=1) / counted.sum(dim=1)


class HeadGates(Hooks):
    """Multiplies each head's output by a gate of 1 while it is entered, one gate for each sample and head.

    A head's output is its slice of the output projection's input. Weights are frozen meanwhile, so that autograd
    keeps nothing for them. Samples do not mix, so that the gradient of a sum of losses with respect to a sample's
    gate is that of its own loss.

    Args:
        forward: Around a transformers model, bare, whole on this process.
        positions: Tokens that enter the margin loss.
    """

    def __init__(self, forward: Forward, positions: Positions) -> None:
        super().__init__()
        self._forward, self._positions = forward, positions
        self._layout = head_layout(model_config(forward.model))
        layers = decoder_layers(forward.model)
        self._projections = [output_projection(layer, self._layout.model_type) for layer in layers]
        self._gates: list[Tensor] = []

    @torch.enable_grad()
    def read(self, batch: dict[str, Any]) -> Tensor:
        """Gradients of each sample's margin loss with respect to its gates, ``[B, L, H]`` in fp32 on the CPU."""
        shape = len(batch["input_ids"]), self._layout.n_heads
        self._gates = [torch.ones(shape, device=self._forward.device, requires_grad=True) for _ in self._projections]
        losses = margin_loss(*counted_logits(self._forward, batch, self._positions))
        return torch.stack(torch.autograd.grad(losses.sum(), self._gates), dim=1).cpu()

    def _hook(self) -> None:
        for parameter in self._forward.model.parameters():
            if parameter.requires_grad:
                self._undo.append(partial(setattr, parameter, "requires_grad", True))
                parameter.requires_grad_(False)
        for index, projection in enumerate(self._projections):
            self._undo.append(projection.register_forward_pre_hook(partial(self._gate, index)).remove)

    def _gate(self, index: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs, *rest = inputs
        heads = outputs.unflatten(-1, (self._layout.n_heads, self._layout.head_dim))
        gates = self._gates[index][:, None, :, None].to(outputs.dtype)
        return ((heads * gates).flatten(-2), *rest)
