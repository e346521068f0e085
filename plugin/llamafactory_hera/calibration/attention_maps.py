"""Reading attention flow off a model's own attention, one layer at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..heads.families import attention_module, decoder_layers, head_layout, model_config
from .saliency import attention_flow, resize_map


class AttentionFlow:
    """Captures I-SAL and text-to-image maps of every head while it is entered::

        with AttentionFlow(model, bins) as flow, torch.no_grad():
            flow.expect(text, image)
            model(**batch)
            saliency, maps = flow.take()

    While it is entered the text decoder computes attention by its own eager implementation, whose weights each layer
    hands out: they are reduced there and then, and no second layer's ``[B, H, T, T]`` is ever held.

    Args:
        model: A transformers model, bare, whole on this process.
        bins: Length of the maps; at most the image tokens of any sample.

    Raises:
        ValueError: Unknown architecture.
    """

    def __init__(self, model: nn.Module, bins: int) -> None:
        self._layout = head_layout(model_config(model))
        self._attentions = [attention_module(layer, self._layout.model_type) for layer in decoder_layers(model)]
        self._model, self._bins = model, bins
        self._samples: list[tuple[Tensor, Tensor]] = []
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._undo: list[Any] = []

    def __enter__(self) -> "AttentionFlow":
        eager = _eager_attention(self._model, self._attentions)
        eager.__enter__()
        self._undo = [lambda: eager.__exit__(None, None, None)]
        for index, attention in enumerate(self._attentions):
            self._undo.append(attention.register_forward_hook(self._after(index)).remove)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._found.clear()

    def expect(self, text: Tensor, image: Tensor) -> None:
        """Says which tokens of the next forward pass are text and which are image, boolean ``[B, T]`` each."""
        self._samples = [
            (words.nonzero().flatten(), patches.nonzero().flatten())
            for words, patches in zip(text, image, strict=True)
        ]
        self._found.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """What the last forward pass showed.

        Returns:
            ``r`` of eq. 3 ``[B, L, H]`` and the maps of eq. 10 ``[B, L, H, bins]``, in fp32 on the model's device.
        """
        layers = [self._found.pop(index) for index in range(len(self._attentions))]
        both = [[torch.stack(part) for part in zip(*samples, strict=True)] for samples in layers]
        flows, maps = zip(*both, strict=True)
        return torch.stack(flows, dim=1), torch.stack(maps, dim=1)

    def _after(self, index: int) -> Any:
        def hook(attention: nn.Module, _: Any, output: tuple[Tensor, Tensor | None]) -> None:
            weights = output[1]
            if weights is None:
                raise RuntimeError(f"{type(attention).__name__} handed out no attention weights.")
            self._found[index] = [
                (flow, resize_map(maps, self._bins))
                for flow, maps in (
                    attention_flow(weights[row], words, patches) for row, (words, patches) in enumerate(self._samples)
                )
            ]

        return hook


@contextmanager
def _eager_attention(model: nn.Module, attentions: list[nn.Module]) -> Iterator[None]:
    """The text decoder's eager attention; masks are made for the implementation that its configuration names."""
    configs = {id(c): c for c in (model_config(model).get_text_config(), *(a.config for a in attentions))}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
