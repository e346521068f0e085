"""A hook that changes the attention mask and the token embeddings of the text decoder for one forward pass."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..heads.families import model_config, text_decoder
from ..heads.hooks import Hooks


class DecoderInputs(Hooks):
    """Changes the inputs of the text decoder, outside the checkpointed layers and inside every wrapper.

    With ``two_way``, the visual tokens of a sample see each other in both directions, as in JARVIS, unless ``set``
    gave the pass a mask. A model trained this way must also generate and be evaluated inside this context.
    """

    def __init__(self, model: nn.Module, two_way: bool = False) -> None:
        super().__init__()
        self._decoder = text_decoder(model)
        self._model = next(m for m in model.modules() if isinstance(m, PreTrainedModel)) if two_way else None
        self._image_token = model_config(model).image_token_id if two_way else -1
        self._attention: Tensor | None = None
        self._two_way: Tensor | None = None
        self._embeddings: tuple[Tensor, Tensor] | None = None

    def set(self, attention: Tensor | None = None, embeddings: tuple[Tensor, Tensor] | None = None) -> None:
        """Sets the changes for the next forward pass; None keeps the model's own input.

        ``attention``, boolean ``[B, L, L]``, is true where a token (second axis) sees another (third), in all layers.
        ``embeddings`` are positions ``[B, p]`` (-1 for none) and the vector ``[D]`` to write there.
        """
        self._attention, self._embeddings = attention, embeddings

    def _hook(self) -> None:
        self._undo.append(self._decoder.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        if self._model is not None:
            self._undo.append(self._model.register_forward_pre_hook(self._read_ids, with_kwargs=True).remove)

    def _read_ids(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Derives the two-way mask from the token ids, which the decoder does not receive."""
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        self._two_way = None
        if ids is None or ids.shape[1] == 1:  # a generated token sees all earlier tokens anyway
            return
        visual, places = ids == self._image_token, torch.arange(ids.shape[1], device=ids.device)
        sees = (places.unsqueeze(1) >= places) | (visual.unsqueeze(2) & visual.unsqueeze(1))
        self._two_way = sees if mask is None else sees & mask.bool().unsqueeze(1)

    def _before(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        attention = self._two_way if self._attention is None else self._attention
        embeddings, self._attention, self._embeddings = self._embeddings, None, None  # valid for one pass
        if attention is None and embeddings is None:
            return None
        embeds = kwargs["inputs_embeds"]
        if embeddings is not None:
            positions, vector = embeddings
            # Positions of -1 go to an extra column, so that shapes do not depend on values. A mask is scattered, not
            # the vector, because the gradient of a scattered vector counts a repeated position several times.
            hidden = torch.zeros(len(embeds), embeds.shape[1] + 1, dtype=torch.bool, device=embeds.device)
            hidden = hidden.scatter(1, torch.where(positions < 0, embeds.shape[1], positions), True)[:, :-1]
            embeds = torch.where(hidden.unsqueeze(-1), vector.to(embeds), embeds)
            kwargs = kwargs | {"inputs_embeds": embeds}
        if attention is not None:
            # not -inf, because a padding token that sees nothing would become NaN
            closed = torch.zeros_like(attention, dtype=embeds.dtype)
            closed.masked_fill_(~attention, torch.finfo(embeds.dtype).min)
            kwargs = kwargs | {"attention_mask": closed.unsqueeze(1)}
        return args, kwargs
