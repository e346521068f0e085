"""Reference values for heads and layers, read from a model's blocks without the plugin's hooks."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from llamafactory_hera.heads import Target
from llamafactory_hera.heads.capture import HeadCapture, LayerCapture
from llamafactory_hera.heads.families import decoder_layers, head_layout, model_config
from llamafactory_hera.heads.probe import pooled_heads

#: Weight ``[D, H * d]`` and bias of each layer's output projection.
Projections = list[tuple[Tensor, Tensor | None]]

HEADS = "L1H3,L0H2,L1H0,L1H1"
#: Targets -> the class that captures them.
CAPTURES = {HEADS: HeadCapture, "L1,L0": LayerCapture}
both = pytest.mark.parametrize("names", CAPTURES, ids=["heads", "layers"])
checkpointed = pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])


def checkpoint(model: nn.Module, reentrant: bool | None) -> None:
    """Enables gradient checkpointing as a Trainer does; None leaves it off."""
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()  # as PEFT does for frozen inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Returns each trainable parameter's gradient, or zeros if no loss reached it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}


def weighted_sum(z: Tensor) -> Tensor:
    """Adds all values with different fixed weights, so that every value has its own gradient."""
    return (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum()


@dataclass
class Block:
    """The ``[B, T, ...]`` values of all tokens in one layer."""

    entered: Tensor  # input of the output projection
    attended: Tensor  # output of the attention module
    output: Tensor  # output of the layer


def mean_over(hidden: Tensor, mask: Tensor) -> Tensor:
    """Averages the marked tokens, one row at a time."""
    rows = []
    for row, keep in zip(hidden, mask.bool(), strict=True):
        rows.append(row[keep].mean(0) if keep.any() else row.new_zeros(row.shape[1:]))
    return torch.stack(rows)


def mixer(layer: nn.Module) -> nn.Module:
    """Returns the module that mixes the tokens of a layer."""
    names = ("self_attn", "linear_attn", "conv")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def projection(mixer: nn.Module) -> nn.Linear:
    """Returns the output projection of a mixer."""
    return mixer.o_proj if hasattr(mixer, "o_proj") else mixer.out_proj


def keep(block: Block, name: str, *values: object) -> None:
    """Keeps the last value that a hook receives, or the first element of a tuple."""
    setattr(block, name, values[-1][0] if isinstance(values[-1], tuple) else values[-1])


def blocks(model: nn.Module, batch: dict[str, Tensor], grad: bool = False) -> tuple[list[Block], object]:
    """Runs a forward pass, and returns the tokens of every block and the model's output."""
    found = [Block(*[torch.empty(0)] * 3) for _ in decoder_layers(model)]
    handles = []
    for block, layer in zip(found, decoder_layers(model), strict=True):
        attention = mixer(layer)
        handles += [
            projection(attention).register_forward_pre_hook(partial(keep, block, "entered")),
            attention.register_forward_hook(partial(keep, block, "attended")),
            layer.register_forward_hook(partial(keep, block, "output")),
        ]
    with torch.set_grad_enabled(grad):
        output = model(**batch)
    for handle in handles:
        handle.remove()
    return found, output


def check_heads(
    model: nn.Module,
    batch: dict[str, Tensor],
    mask: Tensor,
    projections: Projections | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Compares every head's captured contribution with the blocks' values; ``projections`` default to the modules'."""
    layout = head_layout(model_config(model))
    every = [Target(index, head) for index, layer in enumerate(layout.layers) for head in range(layer.n_heads)]
    with HeadCapture(model, every) as capture:
        capture.pool(mask)
        model(**batch)
        captured = capture.representations().detach()
    assert captured.shape == (len(every), mask.shape[0], layout.hidden_size)
    rows = iter(captured)
    kept = mask.bool().any(1, keepdim=True)
    for index, block in enumerate(blocks(model, batch)[0]):
        heads = layout.layers[index]
        if not heads.n_heads:
            continue
        assert block.entered.shape[-1] == heads.n_heads * heads.head_dim
        module = projection(mixer(decoder_layers(model)[index]))
        contributions = torch.stack([next(rows) for _ in range(heads.n_heads)])
        expected = mean_over(block.attended, mask)
        weight, bias = (module.weight, module.bias) if projections is None else projections[index]
        if bias is not None:
            expected = (expected - bias.detach()) * kept
        scale = expected.abs().max().item()
        assert scale > 1e-3
        torch.testing.assert_close(contributions.sum(0), expected, rtol=0, atol=tolerance * scale)
        for head, contribution in enumerate(contributions):
            columns = slice(head * heads.head_dim, (head + 1) * heads.head_dim)
            part = mean_over(block.entered[..., columns], mask) @ weight.detach()[:, columns].T
            torch.testing.assert_close(contribution, part, rtol=0, atol=tolerance * scale)


def check_layers(model: nn.Module, batch: dict[str, Tensor], mask: Tensor, tolerance: float = 1e-5) -> None:
    """Compares the captured output of every layer with the layer's own output."""
    with LayerCapture(model, "L1,L0") as capture:
        capture.pool(mask)
        model(**batch)
        captured = capture.representations()
    assert captured.requires_grad
    expected = torch.stack([mean_over(block.output, mask) for block in blocks(model, batch)[0]])
    scale = expected.abs().max().item()
    torch.testing.assert_close(captured.detach(), expected.flip(0), rtol=0, atol=tolerance * scale)


def check_pooled(model: nn.Module, batch: dict[str, Tensor], mask: Tensor, tolerance: float = 1e-5) -> None:
    """Compares pooled outputs of all heads and layers, read in one pass, with the blocks' own."""
    heads, layers = pooled_heads(model, mask.bool(), partial(model, **batch))
    layout = head_layout(model_config(model))
    assert [of_layer.shape[1:] for of_layer in heads] == [layer[1:3] for layer in layout.layers]
    assert layers.shape == (mask.shape[0], layout.n_layers, layout.hidden_size)
    assert heads[0].dtype == layers.dtype == torch.float32
    for index, block in enumerate(blocks(model, batch)[0]):
        for got, tokens in ((heads[index].flatten(1), block.entered), (layers[:, index], block.output)):
            if not got.numel():
                continue
            expected = mean_over(tokens.float(), mask)
            scale = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)
