"""How far each update may go: KL on held-out samples, halved steps, roll-back (section 3.4, eq. 14 and 15)."""

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
    """What became of an update: its state and its step, 0 where it was given up."""

    update: Update
    state: str
    alpha: float = 0.0
    tried: Sequence[tuple[float, float]] = ()  # steps that were tried on it alone, with their divergence in nats


@dataclass(frozen=True)
class Outcome:
    """What became of all updates, in the order of the plan."""

    trials: Sequence[Trial] = ()
    totals: Sequence[tuple[int, float]] = ()  # numbers of updates that were tried together, with their divergence

    @property
    def accepted(self) -> list[Scaled]:
        """The updates that stay, with their step sizes."""
        return [(trial.update, trial.alpha) for trial in self.trials if trial.alpha > 0]

    @property
    def kl(self) -> float:
        """Divergence of all that stays."""
        return self.totals[-1][1] if self.accepted else 0.0


def try_updates(updates: Sequence[Update], kl: Callable[[Sequence[Scaled]], float], config: RahConfig) -> Outcome:
    """Finds each update's step alone, then gives the last ones up, one by one, until all together hold.

    The step is the first of ``alpha_max, alpha_max / 2, ...`` with a divergence of ``delta`` or less (text under eq.
    15). The highest CAF comes first, so the least influential updates are given up. ``kl`` is :meth:`HeldOut.kl`.
    Pruning has no bound: all of it stays.
    """
    if config.update == "prune":
        pruned = [Trial(update, "pruned", 1.0) for update in updates]
        return Outcome(pruned, [(len(updates), kl([(update, 1.0) for update in updates]))])
    trials = [_try(update, kl, config) for update in tqdm(updates, desc="RAH-LoRA | trust region", unit="update")]
    kept = [index for index, trial in enumerate(trials) if trial.alpha > 0]
    totals: list[tuple[int, float]] = []
    while kept:
        together = kl([(trials[index].update, trials[index].alpha) for index in kept])
        totals.append((len(kept), together))
        if together <= config.delta:
            break
        last = kept.pop()
        trials[last] = replace(trials[last], state="rolled back: total too large", alpha=0.0)
    return Outcome(trials, totals)


def _try(update: Update, kl: Callable[[Sequence[Scaled]], float], config: RahConfig) -> Trial:
    if not update.edits:
        return Trial(update, "equals its anchors")
    tried: list[tuple[float, float]] = []
    for halving in range(config.halvings + 1):
        alpha = config.alpha_max / 2**halving
        tried.append((alpha, kl([(update, alpha)])))
        if tried[-1][1] <= config.delta:
            return Trial(update, "calibrated", alpha, tried)
    return Trial(update, "rolled back: no step holds", 0.0, tried)


class HeldOut:
    """Samples that profiling did not see (B of eq. 15), with the logits of the unchanged model on the CPU."""

    def __init__(
        self, forward: Forward, weights: HeadWeights, features: Sequence[Features], collate: Collate, config: RahConfig
    ) -> None:
        self._forward, self._weights, self._positions = forward, weights, config.positions
        batches = plan_batches([len(sample["input_ids"]) for sample in features], config.batch_size)

        @torch.no_grad()
        def run(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
            return batch, counted_logits(forward, batch, config.positions)[0].cpu()

        self._batches = [result for _, result in run_batches(batches, features, collate, run)]
        self.kl()

    @torch.no_grad()
    def kl(self, steps: Sequence[Scaled] = ()) -> float:
        """Mean over samples of the mean divergence over their tokens, in nats; refuses logits that are not finite."""
        values: list[Tensor] = []
        with applied(self._weights, steps):
            for batch, before in self._batches:
                now, counted = counted_logits(self._forward, batch, self._positions)
                # one sample at a time: two distributions over the vocabulary in single precision are large
                for base, changed, kept in zip(before, now, counted, strict=True):
                    kl = divergence(base[kept.cpu()].to(now.device), changed[kept])
                    values.append(kl.double().mean())
        mean = torch.stack(values).mean().item()
        if not math.isfinite(mean):
            raise ValueError(
                f"model_name_or_path: the KL divergence of the changed model is {mean}: logits hold NaN or infinity. "
                "Use bf16 or fp32, or another checkpoint."
            )
        return mean


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """KL(p || p') of next-token distributions (inside eq. 15): from logits ``[..., V]``, ``[...]`` in nats."""
    log_p = torch.log_softmax(base.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
