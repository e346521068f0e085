"""The trust region: a step for each update, bounded by the KL divergence on held-out samples (section 3.4.2)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..selection.passes import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features
from .profile import counted_logits
from .settings import RahConfig
from .weights import HeadWeights, Scaled, Update, applied


@dataclass(frozen=True)
class Trial:
    """The fate of an update."""

    update: Update
    state: str
    alpha: float = 0.0  # its step; 0 if it was rolled back
    tried: Sequence[tuple[float, float]] = ()  # each step that was tried alone, with its KL divergence in nats


@dataclass(frozen=True)
class Outcome:
    """The fate of all updates, in the order of the plan."""

    trials: Sequence[Trial] = ()
    kl_before: float = 0.0  # the KL divergence of all updates together, before any was rolled back
    kl: float = 0.0  # the KL divergence of the updates that remain

    @property
    def accepted(self) -> list[Scaled]:
        """The updates that remain, with their steps."""
        return [(trial.update, trial.alpha) for trial in self.trials if trial.alpha > 0]


def try_updates(updates: Sequence[Update], kl: Callable[[Sequence[Scaled]], float], config: RahConfig) -> Outcome:
    """Finds a step for each update alone, then rolls back the last updates until all others together are in bounds.

    A step is the first of ``alpha_max``, ``alpha_max / 2``, … whose divergence is at most ``delta`` (text below eq.
    15). The updates come with the highest CAF first, so that the least influential ones are rolled back. Pruning has
    no bound, and all of its updates remain.

    Args:
        updates: The updates of the plan.
        kl: Measures the divergence of scaled updates, as :meth:`HeldOut.kl` does.
        config: The keys.
    """
    if config.update == "prune":
        pruned = Outcome([Trial(update, "pruned", 1.0) for update in updates])
        total = kl(pruned.accepted)
        return replace(pruned, kl_before=total, kl=total)
    trials = [_try(update, kl, config) for update in tqdm(updates, desc="RAH-LoRA | trust region", unit="update")]
    kept = [index for index, trial in enumerate(trials) if trial.alpha > 0]
    totals = [kl(Outcome(trials).accepted) if kept else 0.0]
    while totals[-1] > config.delta:
        last = kept.pop()
        trials[last] = replace(trials[last], state="rolled back: total too large", alpha=0.0)
        totals.append(kl(Outcome(trials).accepted) if kept else 0.0)
    return Outcome(trials, totals[0], totals[-1])


def _try(update: Update, kl: Callable[[Sequence[Scaled]], float], config: RahConfig) -> Trial:
    if not update.edits:
        return Trial(update, "equals its anchors")
    tried: list[tuple[float, float]] = []
    for halving in range(config.halvings + 1):
        alpha = config.alpha_max / 2**halving
        tried.append((alpha, kl([(update, alpha)])))
        if tried[-1][1] <= config.delta:
            return Trial(update, "calibrated", alpha, tried)
    return Trial(update, "rolled back: no step is small enough", 0.0, tried)


class HeldOut:
    """Samples that profiling did not use (B in eq. 15), with the unchanged model's logits in main memory."""

    def __init__(
        self, forward: Forward, weights: HeadWeights, features: Sequence[Features], collate: Collate, config: RahConfig
    ) -> None:
        self._forward, self._weights, self._positions = forward, weights, config.positions
        batches = plan_batches([len(sample["input_ids"]) for sample in features], config.batch_size)

        @torch.no_grad()
        def run(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
            return batch, counted_logits(forward, batch, config.positions)[0].cpu()

        self._batches = [result for _, result in run_batches(batches, features, collate, run)]
        self.kl()  # a broken model is refused here

    @torch.no_grad()
    def kl(self, steps: Sequence[Scaled] = ()) -> float:
        """Measures the KL divergence of the changed model: the mean over tokens, then over samples, in nats.

        Raises:
            ValueError: The logits are not finite.
        """
        values: list[Tensor] = []
        with applied(self._weights, steps):
            for batch, before in self._batches:
                now, counted = counted_logits(self._forward, batch, self._positions)
                # one sample at a time, since two fp32 distributions over the vocabulary take much memory
                for base, changed, kept in zip(before, now, counted, strict=True):
                    kl = divergence(base[kept.cpu()].to(now.device), changed[kept])
                    values.append(kl.double().mean())
        mean = torch.stack(values).mean().item()
        if not math.isfinite(mean):
            raise ValueError(
                f"model: the KL divergence of the changed model is {mean}, because its logits contain NaN or "
                "infinity; use bf16 or fp32, or another checkpoint."
            )
        return mean


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """Computes ``KL(p || p')`` of next-token distributions in nats (eq. 15), ``[...]`` from logits ``[..., V]``."""
    log_p = torch.log_softmax(base.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
