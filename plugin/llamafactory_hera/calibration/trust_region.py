"""How far each update may go: KL on held-out samples, halved steps, roll-back (section 3.4, eq. 14 and 15)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..selection.forward import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features
from .profile import counted_logits
from .settings import RahConfig
from .weights import HeadWeights, Update, applied

State = Literal["calibrated", "equals its anchors", "rolled back: no step holds", "rolled back: total too large"]


class Step(NamedTuple):
    """A step that was tried, and the divergence that it caused, in nats."""

    alpha: float
    kl: float


@dataclass(frozen=True)
class Trial:
    """What became of an update.

    Attributes:
        update: The update.
        state: In words.
        alpha: Its step size; 0 where it was given up.
        tried: The steps that were tried, with the divergence of this update alone.
    """

    update: Update
    state: State
    alpha: float = 0.0
    tried: list[Step] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of all updates.

    Attributes:
        trials: In the order of the plan.
        totals: Divergences of the first so many accepted updates together, ``alpha`` being their number.
    """

    trials: list[Trial] = field(default_factory=list)
    totals: list[Step] = field(default_factory=list)

    @property
    def accepted(self) -> list[tuple[Update, float]]:
        """The updates that stay, with their step sizes."""
        return [(trial.update, trial.alpha) for trial in self.trials if trial.state == "calibrated"]

    @property
    def kl(self) -> float:
        """Divergence of all that stays."""
        return self.totals[-1].kl if self.accepted else 0.0


class HeldOut:
    """Samples that profiling did not see (the batch B of eq. 15), with the logits of the unchanged model.

    The logits wait in the CPU's memory.

    Args:
        forward: Around the model as it is.
        features: The samples.
        collate: From samples to a batch.
        config: Positions and batch size.

    Raises:
        ValueError: The logits are not finite.
    """

    def __init__(self, forward: Forward, features: Sequence[Features], collate: Collate, config: RahConfig) -> None:
        self._forward, self._positions = forward, config.positions
        batches = plan_batches([len(sample["input_ids"]) for sample in features], config.batch_size)

        @torch.no_grad()
        def run(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
            return batch, counted_logits(forward, batch, config.positions)[0].cpu()

        self._batches = [result for _, result in run_batches(batches, features, collate, run)]
        _check_finite(self.kl())

    @torch.no_grad()
    def kl(self) -> float:
        """Mean over samples of the mean divergence over their tokens, of the model as it is now from what it was."""
        values: list[Tensor] = []
        for batch, before in self._batches:
            now, counted = counted_logits(self._forward, batch, self._positions)
            # one sample at a time: two distributions over the vocabulary in single precision are large
            for row in range(len(now)):
                kept = counted[row]
                earlier = before[row][kept.cpu()].to(now.device)
                values.append(divergence(earlier, now[row][kept]).double().mean())
        return torch.stack(values).mean().item()


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """KL(p || p') of next-token distributions (the expectation's argument in eq. 15).

    Args:
        base: Logits of the model as it is, ``[..., V]``.
        changed: Logits of the changed model, ``[..., V]``.

    Returns:
        ``[...]`` in fp32, in nats.
    """
    log_p = torch.log_softmax(base.float(), dim=-1)
    log_q = torch.log_softmax(changed.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def try_updates(updates: Sequence[Update], weights: HeadWeights, held_out: HeldOut, config: RahConfig) -> Outcome:
    """Finds each update's step alone, then rolls the last ones back until all together hold.

    The updates come with the highest CAF first, so that the least influential ones are given up. The model's weights
    are as before afterwards.

    Raises:
        ValueError: A divergence is not finite.
    """

    def kl(steps: Sequence[tuple[Update, float]]) -> float:
        with applied(weights, steps):
            return held_out.kl()

    def attempt(update: Update) -> Trial:
        if not update.edits:
            return Trial(update, "equals its anchors")
        alpha, tried = largest_step(lambda alpha: kl([(update, alpha)]), config)
        return Trial(update, "calibrated" if alpha > 0 else "rolled back: no step holds", alpha, tried)

    trials = [attempt(update) for update in tqdm(updates, desc="RAH-LoRA | trust region", unit="update")]
    stepped = [index for index, trial in enumerate(trials) if trial.alpha > 0]
    steps = [(trials[index].update, trials[index].alpha) for index in stepped]
    kept, totals = roll_back(lambda n: kl(steps[:n]), len(steps), config.delta)
    for index in stepped[kept:]:
        trials[index] = replace(trials[index], state="rolled back: total too large", alpha=0.0)
    return Outcome(trials, totals)


def largest_step(kl: Callable[[float], float], config: RahConfig) -> tuple[float, list[Step]]:
    """The first of ``alpha_max, alpha_max / 2, ...`` with a divergence of ``delta`` or less (text under eq. 15).

    Args:
        kl: Mean divergence of a step.
        config: Where to start, the bound, and after how many halvings the update is given up.

    Returns:
        The step, 0 where none holds, and all that were tried.
    """
    tried: list[Step] = []
    for halving in range(config.halvings + 1):
        alpha = config.alpha_max / 2**halving
        tried.append(Step(alpha, _check_finite(kl(alpha))))
        if tried[-1].kl <= config.delta:
            return alpha, tried
    return 0.0, tried


def roll_back(kl: Callable[[int], float], n: int, delta: float) -> tuple[int, list[Step]]:
    """How many of ``n`` updates, the first ones, stay together within ``delta``; the last are given up one by one.

    Args:
        kl: Mean divergence of the first so many updates together.
        n: Number of updates.
        delta: The bound.

    Returns:
        How many stay, and what was measured on the way, ``alpha`` being the number of updates.
    """
    measured: list[Step] = []
    for kept in range(n, 0, -1):
        measured.append(Step(kept, _check_finite(kl(kept))))
        if measured[-1].kl <= delta:
            return kept, measured
    return 0, measured


def _check_finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(
            f"model_name_or_path: the KL divergence between the model and its changed copy is {value}: its logits "
            "hold NaN or infinity, or its activations do not fit fp16. Use bf16 or fp32, or another checkpoint."
        )
    return value
