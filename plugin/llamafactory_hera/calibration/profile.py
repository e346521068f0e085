"""Profiling: which heads look across text and image (I-SAL), and which decide what a model is sure of (CAF)."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d
from tqdm import tqdm

from ..files import write_safetensors
from ..heads.families import attention_module, decoder_layers, head_layout, model_config, output_projection
from ..heads.hooks import Hooks
from ..heads.targets import Pooling
from ..selection.passes import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features, Sample
from .settings import Positions, RahConfig

_POOLINGS: dict[Positions, Pooling] = {"text": "text", "all": "mean", "last": "last"}


def attention_flow(attention: Tensor, text: Tensor, image: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """``r`` of eq. 3 ``[H]`` and ``A^{T->I}`` of eq. 10 ``[H, bins]``, in fp32, of one sample.

    From its attention ``[H, T, T]``, queries before keys, and the positions of its text and image tokens. Images may
    have different numbers of tokens, and a mean of maps needs one length: neighboring tokens share a bin.
    """
    to_image = attention[:, text][:, :, image].float()
    to_text = attention[:, image][:, :, text].float()
    maps = adaptive_avg_pool1d(to_image.mean(dim=1), bins) * (len(image) / bins)
    return (to_image.mean(dim=(1, 2)) + to_text.mean(dim=(1, 2))) / 2, maps


class AttentionFlow(Hooks):
    """Reads :func:`attention_flow` of every head while it is entered; the text decoder's attention is eager meanwhile.

    Each layer's weights are reduced there and then, so that no second layer's ``[B, H, T, T]`` is ever held.
    """

    def __init__(self, forward: Forward, bins: int) -> None:
        super().__init__()
        config = model_config(forward.model)
        self._forward, self._bins, self._text_config = forward, bins, config.get_text_config()
        layers = decoder_layers(forward.model)
        self._attentions = [attention_module(layer) for layer in layers]
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


def counted_logits(forward: Forward, batch: dict[str, Any], positions: Positions) -> tuple[Tensor, Tensor]:
    """Logits ``[B, P, V]`` at the tokens that count in any sample of a batch, and which count in each, ``[B, P]``."""
    counted = forward.tokens(_POOLINGS[positions], batch)
    kept = counted.any(dim=0).nonzero().flatten()
    return forward.logits(batch, kept), counted[:, kept]


def margin_loss(logits: Tensor, counted: Tensor) -> Tensor:
    """The label-free margin loss of each sample, ``-1/T sum_t log(p_t1 / p_t2)`` (text under eq. 5), ``[B]`` in fp32.

    From logits ``[B, T, V]`` and the tokens that count, boolean ``[B, T]``; a log ratio is a difference of logits.
    """
    top = torch.topk(logits, 2, dim=-1).values.float()
    margin = (top[..., 0] - top[..., 1]).masked_fill(~counted, 0)
    return -margin.sum(dim=1) / counted.sum(dim=1)


class HeadGates(Hooks):
    """Multiplies each head's output by a gate of 1 while it is entered, one gate for each sample and head.

    A head's output is its slice of the output projection's input. Samples do not mix: the gradient of a sum of losses
    with respect to a sample's gate is that of its own loss.
    """

    def __init__(self, forward: Forward, positions: Positions) -> None:
        super().__init__()
        self._forward, self._positions = forward, positions
        self._layout = head_layout(model_config(forward.model))
        layers = decoder_layers(forward.model)
        self._projections = [output_projection(layer) for layer in layers]
        self._gates: list[Tensor] = []

    @torch.enable_grad()
    def read(self, batch: dict[str, Any]) -> Tensor:
        """Gradients of each sample's margin loss with respect to its gates, ``[B, L, H]`` in fp32 on the CPU."""
        shape = len(batch["input_ids"]), self._layout.n_heads
        self._gates = [torch.ones(shape, device=self._forward.device, requires_grad=True) for _ in self._projections]
        losses = margin_loss(*counted_logits(self._forward, batch, self._positions))
        return torch.stack(torch.autograd.grad(losses.sum(), self._gates), dim=1).cpu()

    def _hook(self) -> None:
        for index, projection in enumerate(self._projections):
            self._undo.append(projection.register_forward_pre_hook(partial(self._gate, index)).remove)

    def _gate(self, index: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs, *rest = inputs
        heads = outputs.unflatten(-1, (self._layout.n_heads, self._layout.head_dim))
        gates = self._gates[index][:, None, :, None].to(outputs.dtype)
        return ((heads * gates).flatten(-2), *rest)


def standard_scores(values: Tensor) -> Tensor:
    """Standard scores of heads ``[L, H]`` within each layer (eq. 4); zero where all are equal."""
    centered = values - values.mean(dim=1, keepdim=True)
    deviation = centered.square().mean(dim=1, keepdim=True).sqrt()
    return centered / (deviation + 1e-12)  # the paper's epsilon, far below any deviation of attention weights


@dataclass(frozen=True)
class Profile:
    """What profiling measured."""

    flow: Tensor  # [L, H] in fp64: r of eq. 3, the mean over samples
    maps: Tensor  # [L, H, bins] in fp32: average text-to-image attention of eq. 10
    gradients: Tensor  # [N, L, H] in fp32: gate gradients of each probe sample

    @property
    def saliency(self) -> Tensor:
        """I-SAL: standard scores of ``r``, ``[L, H]``."""
        return standard_scores(self.flow)

    def influence(self, curvature_weight: float) -> Tensor:
        """CAF (eq. 5), ``[L, H]``: the mean gradient, with its sign, plus lambda times the mean squared gradient."""
        values = self.gradients.double()
        return values.mean(dim=0) + curvature_weight * values.square().mean(dim=0)

    def save(self, path: Path, key: str) -> None:
        """Writes the file, complete or not at all; raises OSError where it cannot be written."""
        write_safetensors(path, vars(self), {"key": key})

    @classmethod
    def load(cls, path: Path, key: str) -> "Profile | None":
        """A profile of an earlier run; None if there is none of this key."""
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return None


def profile_heads(
    forward: Forward, features: Sequence[Features], collate: Collate, config: RahConfig, num_workers: int = 0
) -> Profile:
    """Measures every head on samples that each have image and text tokens; the first ``rah_probes`` are the probes."""

    def each(what: str, samples: Sequence[Features], read: Callable[[dict[str, Any]], Iterable[Any]]) -> list[Any]:
        found: dict[int, Any] = {}
        batches = plan_batches([len(sample["input_ids"]) for sample in samples], config.batch_size)
        with tqdm(total=len(samples), desc=f"RAH-LoRA | {what}", unit="sample") as bar:
            for batch, results in run_batches(batches, samples, collate, read, num_workers):
                found.update(zip(batch, results, strict=True))
                bar.update(len(batch))
        # in the order of the samples, so that the batches do not decide the rounding of a mean
        return [found[row] for row in range(len(samples))]

    bins = min(sum(token in forward.media for token in sample["input_ids"]) for sample in features)
    with AttentionFlow(forward, bins) as attention:
        flows, maps = zip(*each("attention", features, attention.read), strict=True)
    with HeadGates(forward, config.positions) as gates:
        gradients = torch.stack(each("gates", features[: config.probes], gates.read))
    profile = Profile(_mean(flows), _mean(maps).float(), gradients)
    if not (profile.flow.isfinite().all() and gradients.isfinite().all()):
        raise ValueError(
            "model_name_or_path: its attention or gradients hold NaN or infinity; use bf16 or fp32, or another model."
        )
    return profile


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum((value.double() for value in values), start=torch.zeros(())) / len(values)


def check_tokens(forward: Forward, samples: Sequence[Sample]) -> None:
    """Refuses a sample without tokens of both kinds; names its row."""
    for sample in samples:
        missing = {"image", "text"} - {"image" if t in forward.media else "text" for t in sample.features["input_ids"]}
        if missing:
            raise ValueError(
                f"dataset: sample {sample.row} (counted from 0) leaves no {missing.pop()} token; check that its "
                "text holds <image>, and that template is the model's."
            )


def weights_digest(model: nn.Module) -> str:
    """A digest of the name, type, shape and every value of every weight: whether a profile belongs to a model.

    Of a matrix it takes the sums over rows and columns of its bytes as whole numbers, the same on every device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        weight = parameter.detach().contiguous()
        summaries = [weight.flatten()]
        if weight.dim() > 1 and weight[0].nbytes % 8 == weight.data_ptr() % 8 == 0:  # whole words of 8 bytes
            words = weight.flatten(1).view(torch.int64)
            summaries = [words.sum(dim=0), words.sum(dim=1)]
        for summary in summaries:
            digest.update(summary.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
