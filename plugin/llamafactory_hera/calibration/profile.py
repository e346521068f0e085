"""Profiling: I-SAL by forward passes, gate gradients by backward passes, kept on disk for the next run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..files import write_safetensors
from ..selection.batches import plan_batches, run_batches
from ..selection.source import Collate, Features
from .attention_maps import AttentionFlow
from .forward import Forward
from .gates import HeadGates
from .influence import causal_attention_flow, margin_loss
from .saliency import standardize

_TENSORS = ("flow", "maps", "gradients")


@dataclass(frozen=True)
class Profile:
    """What profiling measured.

    Attributes:
        flow: ``r`` of eq. 3, the mean over samples, ``[L, H]`` in fp64.
        maps: Average text-to-image attention of eq. 10, ``[L, H, bins]`` in fp32.
        gradients: Gate gradients of each probe sample, ``[N, L, H]`` in fp32.
    """

    flow: Tensor
    maps: Tensor
    gradients: Tensor

    @property
    def saliency(self) -> Tensor:
        """Standardised I-SAL (eq. 4), ``[L, H]``."""
        return standardize(self.flow)

    def influence(self, curvature_weight: float) -> Tensor:
        """CAF (eq. 5), ``[L, H]``."""
        return causal_attention_flow(self.gradients, curvature_weight)

    def save(self, path: Path, key: str) -> None:
        """Writes the file; it appears complete or not at all.

        Raises:
            OSError: It cannot be written.
        """
        write_safetensors(path, {name: getattr(self, name) for name in _TENSORS}, {"key": key})

    @classmethod
    def load(cls, path: Path, key: str) -> "Profile | None":
        """A profile of an earlier run; None if there is none of this key."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return cls(**{name: file.get_tensor(name) for name in _TENSORS})
        except (OSError, SafetensorError):
            return None


def profile_heads(
    forward: Forward,
    features: Sequence[Features],
    collate: Collate,
    probes: int,
    batch_size: int,
    num_workers: int = 0,
) -> Profile:
    """Measures every head.

    Args:
        forward: Around the model.
        features: N samples, each with image and text tokens.
        collate: From samples to a batch.
        probes: On how many of them, the first ones, gradients are taken.
        batch_size: Samples in a pass.
        num_workers: Processes that collate.

    Raises:
        ValueError: A gradient or an attention weight is not finite.
    """
    flow, maps = _attention_pass(forward, features, collate, batch_size, num_workers)
    gradients = _gradient_pass(forward, features[:probes], collate, batch_size, num_workers)
    for name, values in (("attention weights hold", flow), ("gradients of the gates hold", gradients)):
        if not values.isfinite().all():
            raise ValueError(
                f"model_name_or_path: its {name} NaN or infinity. The checkpoint is damaged, or its activations do "
                "not fit fp16: use bf16 or fp32."
            )
    return Profile(flow, maps, gradients)


def _attention_pass(
    forward: Forward, features: Sequence[Features], collate: Collate, batch_size: int, num_workers: int
) -> tuple[Tensor, Tensor]:
    bins = min(forward.count_image_tokens(sample["input_ids"]) for sample in features)
    batches = plan_batches([len(sample["input_ids"]) for sample in features], batch_size)
    flows: dict[int, Tensor] = {}
    maps: dict[int, Tensor] = {}
    with AttentionFlow(forward.model, bins) as attention, torch.no_grad(), _bar("attention", len(features)) as bar:

        def run(batch: dict) -> tuple[Tensor, Tensor]:
            attention.expect(*forward.modalities(batch))
            forward.run(batch)
            flow, found = attention.take()
            return flow.cpu(), found.cpu()

        for batch, results in run_batches(batches, features, collate, run, num_workers):
            for row, flow, found in zip(batch.rows, *results, strict=True):
                flows[row], maps[row] = flow, found
            bar.update(len(batch.rows))
    # in the order of the samples, so that the batches do not decide the rounding
    flow = sum(flows[row].double() for row in range(len(features))) / len(features)
    return flow, (sum(maps[row].double() for row in range(len(features))) / len(features)).float()


def _gradient_pass(
    forward: Forward, features: Sequence[Features], collate: Collate, batch_size: int, num_workers: int
) -> Tensor:
    batches = plan_batches([len(sample["input_ids"]) for sample in features], batch_size)
    gradients: dict[int, Tensor] = {}
    with HeadGates(forward.model) as gates, torch.enable_grad(), _bar("gates", len(features)) as bar:

        def run(batch: dict) -> Tensor:
            gates.reset(len(batch["input_ids"]))
            return gates.gradients(margin_loss(*forward.logits(batch))).cpu()

        for batch, found in run_batches(batches, features, collate, run, num_workers):
            gradients.update(zip(batch.rows, found, strict=True))
            bar.update(len(batch.rows))
    return torch.stack([gradients[row] for row in range(len(features))])


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=f"RAH-LoRA | {what}", unit="sample")
