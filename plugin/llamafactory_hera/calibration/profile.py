"""Profiling a model: I-SAL by forward passes, gate gradients by backward passes, kept on disk for the next run."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_safetensors
from ..selection.forward import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features, Sample
from .measure import AttentionFlow, HeadGates
from .settings import RahConfig

_WORD = 8  # bytes


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
        """I-SAL: standard scores of ``r`` within each layer (eq. 4), ``[L, H]``; zero where all heads are equal."""
        centred = self.flow - self.flow.mean(dim=1, keepdim=True)
        deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
        # the paper's epsilon, far below any deviation that attention weights have, so that the unit stays a deviation
        return centred / (deviation + 1e-12)

    def influence(self, curvature_weight: float) -> Tensor:
        """CAF (eq. 5): the mean gradient with respect to a head's gate, plus lambda times its mean square, ``[L, H]``.

        As in the paper the first term keeps its sign.
        """
        values = self.gradients.double()
        return values.mean(dim=0) + curvature_weight * values.square().mean(dim=0)

    def save(self, path: Path, key: str) -> None:
        """Writes the file, complete or not at all; raises OSError where it cannot be written."""
        write_safetensors(path, vars(self), {"key": key})

    @classmethod
    def load(cls, path: Path, key: str) -> "Profile | None":
        """A profile of an earlier run; None if there is none of this key."""
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("key") != key:
                    return None
                return cls(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError):
            return None


def profile_heads(
    forward: Forward, features: Sequence[Features], collate: Collate, config: RahConfig, num_workers: int = 0
) -> Profile:
    """Measures every head.

    Args:
        forward: Around the model.
        features: N samples, each with image and text tokens; the first ``rah_probes`` are the probes.
        collate: From samples to a batch.
        config: Probes, positions and batch size.
        num_workers: Processes that collate.

    Raises:
        ValueError: A gradient or an attention weight is not finite.
    """

    def each(what: str, samples: Sequence[Features], read: Callable[[dict[str, Any]], Iterable[Any]]) -> list[Any]:
        found: dict[int, Any] = {}
        batches = plan_batches([len(sample["input_ids"]) for sample in samples], config.batch_size)
        with tqdm(total=len(samples), desc=f"RAH-LoRA | {what}", unit="sample") as bar:
            for batch, results in run_batches(batches, samples, collate, read, num_workers):
                found.update(zip(batch.rows, results, strict=True))
                bar.update(len(batch.rows))
        # in the order of the samples, so that the batches do not decide the rounding of a mean
        return [found[row] for row in range(len(samples))]

    bins = min(_count_image_tokens(forward, sample) for sample in features)
    with AttentionFlow(forward, bins) as attention:
        flows, maps = zip(*each("attention", features, attention.read), strict=True)
    with HeadGates(forward, config.positions) as gates:
        gradients = torch.stack(each("gates", features[: config.probes], gates.read))
    profile = Profile(_mean(flows), _mean(maps).float(), gradients)
    for name, values in (("attention weights", profile.flow), ("gradients of the gates", gradients)):
        if not values.isfinite().all():
            raise ValueError(
                f"model_name_or_path: its {name} hold NaN or infinity. The checkpoint is damaged, or its activations "
                "do not fit fp16: use bf16 or fp32."
            )
    return profile


def _mean(values: Sequence[Tensor]) -> Tensor:
    return sum((value.double() for value in values), start=torch.zeros(())) / len(values)


def _count_image_tokens(forward: Forward, features: Features) -> int:
    return sum(token in forward.media for token in features["input_ids"])


def check_tokens(forward: Forward, samples: Sequence[Sample]) -> None:
    """Refuses a sample without tokens of both kinds; names its row."""
    for sample in samples:
        count, total = _count_image_tokens(forward, sample.features), len(sample.features["input_ids"])
        if count in (0, total):
            raise ValueError(
                f"dataset: sample {sample.row} (counted from 0) leaves no {'text' if count else 'image'} token; check "
                "that its text holds <image>, and that template is the model's."
            )


def weights_digest(model: nn.Module) -> str:
    """A digest of the name, type, shape and every value of every weight: whether a profile belongs to a model.

    A calibrated adapter changes a few rows or columns of a few projections, and attention depends on vision tower and
    projector, too, so a sample of the decoder's values would not do. Of a matrix the sums over rows and over columns
    of its bytes, read as whole numbers, are hashed: they are computed where the weights lie, the same on every device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} ".encode())
        weight = parameter.detach().contiguous()
        summaries = [weight.flatten()]
        if weight.dim() > 1 and weight[0].nbytes % _WORD == weight.data_ptr() % _WORD == 0:
            words = weight.flatten(1).view(torch.int64)
            summaries = [words.sum(dim=0), words.sum(dim=1)]
        for summary in summaries:
            digest.update(summary.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
