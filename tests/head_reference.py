"""What the contributions of heads must be, read from a model's own attention blocks without the plugin's capture."""

import torch
from torch import Tensor, nn

from llamafactory_hera.heads import HeadCapture, Target
from llamafactory_hera.heads.families import attention_module, decoder_layers, head_layout, model_config

from .tiny_models import HEADS, LAYERS


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """One row at a time, by indexing; the test's own pooling."""
    rows = []
    for row, keep in zip(hidden, mask.bool(), strict=True):
        rows.append(row[keep].mean(0) if keep.any() else row.new_zeros(row.shape[1]))
    return torch.stack(rows)


def attention_blocks(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer: what enters the output projection and what leaves the attention module."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    handles = []
    for layer in decoder_layers(model):
        attention = attention_module(layer, head_layout(model_config(model)).model_type)
        handles += [
            attention.o_proj.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach())),
            attention.register_forward_hook(lambda _, args, output: left.append(output[0].detach())),
        ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return list(zip(entered, left, strict=True))


def check_heads(
    model: nn.Module,
    batch: dict[str, Tensor],
    mask: Tensor,
    projections: list[tuple[Tensor, Tensor | None]] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Holds every head of the model against the attention blocks.

    Args:
        model: A tiny model.
        batch: Its inputs.
        mask: Tokens to pool, ``[B, T]``.
        projections: Weight ``[D, H * d]`` and bias of each layer's output projection; by default the module's own.
        tolerance: Largest difference, relative to the largest value of the block's output.
    """
    with HeadCapture(model, [Target(layer, head) for layer in range(LAYERS) for head in range(HEADS)]) as capture:
        capture.pool(mask)
        model(**batch)
        captured = capture.representations().detach()
    layout = head_layout(model_config(model))
    assert captured.shape == (LAYERS * HEADS, mask.shape[0], layout.hidden_size)
    kept = mask.bool().any(1, keepdim=True)
    for index, (entered, left) in enumerate(attention_blocks(model, batch)):
        assert entered.shape[-1] == HEADS * layout.head_dim
        projection = attention_module(decoder_layers(model)[index], layout.model_type).o_proj
        contributions = captured[index * HEADS : (index + 1) * HEADS]
        expected = mean_over(left, mask)
        weight, bias = (projection.weight, projection.bias) if projections is None else projections[index]
        if bias is not None:
            expected = (expected - bias.detach()) * kept
        scale = expected.abs().max().item()
        assert scale > 1e-3
        torch.testing.assert_close(contributions.sum(0), expected, rtol=0, atol=tolerance * scale)
        for head, contribution in enumerate(contributions):
            columns = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
            part = mean_over(entered[..., columns], mask) @ weight.detach()[:, columns].T
            torch.testing.assert_close(contribution, part, rtol=0, atol=tolerance * scale)
