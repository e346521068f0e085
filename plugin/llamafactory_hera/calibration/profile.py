"""Profiling of heads: attention across text and image (I-SAL), and influence on the output (CAF; section 3.2)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d
from tqdm import tqdm

from ..heads.families import decoder_layers, head_layout, model_config, output_projection, text_decoder
from ..heads.targets import Pooling
from ..selection.passes import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features
from .settings import Positions, RahConfig

_POOLINGS: dict[Positions, Pooling] = {"text": "text", "all": "mean", "last": "last"}


def attention_flow(attention: Tensor, text: Tensor, image: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Reduces one sample's attention ``[H, T, T]`` (heads, queries, keys) to its flow between text and image.

    ``text`` and ``image`` are token positions. The flow consists of ``r`` of eq. 3 ``[H]`` and the text-to-image map
    of eq. 10 ``[H, bins]``, in fp32. Neighboring image tokens share a bin, so that maps of images with different
    numbers of tokens can be averaged.
    """
    to_image = attention[:, text][:, :, image].float()
    to_text = attention[:, image][:, :, text].float()
    maps = adaptive_avg_pool1d(to_image.mean(dim=1), bins) * (len(image) / bins)
    return (to_image.mean(dim=(1, 2)) + to_text.mean(dim=(1, 2))) / 2, maps


@torch.no_grad()
def read_attention(forward: Forward, bins: int, batch: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """Returns ``r`` ``[L, H]`` and the maps ``[L, H, bins]`` of each sample (``attention_flow``), on the CPU.

    Only one layer's attention ``[B, H, T, T]`` is in memory at a time.
    """
    text = forward.tokens("text", batch)
    image = forward.tokens("mean", batch) & ~text
    tokens = [(t.nonzero().flatten(), i.nonzero().flatten()) for t, i in zip(text, image, strict=True)]
    layers: list[list[tuple[Tensor, Tensor]]] = []

    def reduce(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        samples = zip(output[1], tokens, strict=True)
        layers.append([attention_flow(sample, *of_sample, bins) for sample, of_sample in samples])

    decoder: Any = text_decoder(forward.model)
    with ExitStack() as undo:
        undo.callback(decoder.set_attn_implementation, decoder.config._attn_implementation)
        decoder.set_attn_implementation("eager")
        for layer in decoder.layers:
            undo.callback(layer.self_attn.register_forward_hook(reduce).remove)
        forward.run(batch)
    samples = zip(*layers, strict=True)
    return [tuple(torch.stack(kind).cpu() for kind in zip(*of_sample, strict=True)) for of_sample in samples]


def counted_logits(forward: Forward, batch: dict[str, Any], positions: Positions) -> tuple[Tensor, Tensor]:
    """Computes logits ``[B, P, V]``, and a mask ``[B, P]`` of the positions that count in each sample."""
    counted = forward.tokens(_POOLINGS[positions], batch)
    columns = counted.any(dim=0).nonzero().flatten()
    return forward.logits(batch, columns), counted[:, columns]


def margin_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """Computes the margin loss ``-1/T sum_t log(p_t1 / p_t2)`` of each sample, ``[B]`` in fp32 (text below eq. 5)."""
    top = torch.topk(logits, 2, dim=-1).values.float()  # a log ratio of probabilities is a difference of logits
    margin = (top[..., 0] - top[..., 1]).masked_fill(~counted, 0)
    return -margin.sum(dim=1) / counted.sum(dim=1)


@torch.enable_grad()
def gate_gradients(forward: Forward, positions: Positions, batch: dict[str, Any]) -> Tensor:
    """Differentiates each sample's margin loss with respect to a gate at each head, ``[B, L, H]`` in fp32 on the CPU.

    A gate multiplies a head's output, which is a slice of the output projection's input. Each sample has separate
    gates, all equal to 1, so the gradient of a batch's summed loss contains the gradient of each sample's loss.
    """
    layout = head_layout(model_config(forward.model))
    pairs = zip(decoder_layers(forward.model), layout.layers, strict=True)
    projections = [output_projection(layer, heads) for layer, heads in pairs]
    shape = len(batch["input_ids"]), layout.n_heads
    gates = [torch.ones(shape, device=forward.device, requires_grad=True) for _ in projections]

    def multiply(gate: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs, *rest = inputs
        heads = outputs.unflatten(-1, (layout.n_heads, layout.head_dim))
        return ((heads * gate[:, None, :, None].to(outputs.dtype)).flatten(-2), *rest)

    with ExitStack() as undo:
        for projection, gate in zip(projections, gates, strict=True):
            undo.callback(projection.register_forward_pre_hook(partial(multiply, gate)).remove)
        losses = margin_loss(*counted_logits(forward, batch, positions))
    return torch.stack(torch.autograd.grad(losses.sum(), gates), dim=1).cpu()


@dataclass(frozen=True)
class Profile:
    """The measurements of all heads."""

    flow: Tensor  #: r of eq. 3, the mean over samples, [L, H] in fp64.
    maps: Tensor  #: Text-to-image attention of eq. 10, the mean over samples, [L, H, bins] in fp32.
    gradients: Tensor  #: Gate gradients of each probe, [N, L, H] in fp32.

    @property
    def saliency(self) -> Tensor:
        """I-SAL: the standard scores of ``r`` within each layer (eq. 4), ``[L, H]``; 0 if all heads are equal."""
        centered = self.flow - self.flow.mean(dim=1, keepdim=True)
        deviation = centered.square().mean(dim=1, keepdim=True).sqrt()
        return centered / (deviation + 1e-12)  # the paper's epsilon, far below any deviation of attention weights

    def influence(self, curvature_weight: float) -> Tensor:
        """CAF: the signed mean gradient plus ``lambda`` times the mean squared gradient (eq. 5), ``[L, H]``."""
        values = self.gradients.double()
        return values.mean(dim=0) + curvature_weight * values.square().mean(dim=0)


def profile_heads(
    forward: Forward, features: Sequence[Features], collate: Collate, config: RahConfig, num_workers: int = 0
) -> Profile:
    """Measures every head on samples with image and text tokens; CAF uses the first ``rah_probes`` samples."""

    def each(name: str, samples: Sequence[Features], read: Callable[[dict[str, Any]], Iterable[Any]]) -> list[Any]:
        by_row: dict[int, Any] = {}
        batches = plan_batches([len(sample["input_ids"]) for sample in samples], config.batch_size)
        outputs = run_batches(batches, samples, collate, read, num_workers)
        for batch, results in tqdm(outputs, f"RAH-LoRA | {name}", len(batches), unit="batch"):
            by_row.update(zip(batch, results, strict=True))
        # in the order of the samples, so that the rounding of the means does not depend on the batch size
        return [by_row[row] for row in range(len(samples))]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return sum((value.double() for value in values), start=torch.zeros(())) / len(values)

    bins = min(sum(token in forward.media for token in sample["input_ids"]) for sample in features)
    flows, maps = zip(*each("attention", features, partial(read_attention, forward, bins)), strict=True)
    of_gates = partial(gate_gradients, forward, config.positions)
    gradients = torch.stack(each("gates", features[: config.probes], of_gates))
    profile = Profile(mean(flows), mean(maps).float(), gradients)
    check_finite(profile.flow, gradients)
    return profile


def check_finite(*values: Tensor) -> None:
    """Refuses a model that computes NaN or infinity."""
    if not all(value.isfinite().all() for value in values):
        raise ValueError("model: it computes NaN or infinity; use bf16 or fp32, or another checkpoint.")
