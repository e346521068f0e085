"""Trying the updates of a plan within the trust region (RAH-LoRA, eq. 15)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tqdm import tqdm

from .edits import Update, applied
from .held_out import HeldOut
from .settings import RahSettings
from .trust_region import Step, largest_step, roll_back
from .weights import HeadWeights

State = Literal["calibrated", "equals its anchors", "rolled back: no step holds", "rolled back: total too large"]


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

    trials: list[Trial]
    totals: list[Step]

    @property
    def accepted(self) -> list[tuple[Update, float]]:
        """The updates that stay, with their step sizes."""
        return [(trial.update, trial.alpha) for trial in self.trials if trial.state == "calibrated"]

    @property
    def kl(self) -> float:
        """Divergence of all that stays."""
        return self.totals[-1].kl if self.accepted else 0.0


def try_updates(updates: Sequence[Update], weights: HeadWeights, held_out: HeldOut, settings: RahSettings) -> Outcome:
    """Finds each update's step alone, then rolls the last ones back until all together hold.

    The updates come with the highest CAF first, so that the least influential ones are given up.

    Args:
        updates: Of the plan.
        weights: Of the model; as before afterwards.
        held_out: What the divergence is measured on.
        settings: For the bound and the steps.

    Raises:
        ValueError: A divergence is not finite.
    """
    trials = [_try(update, weights, held_out, settings) for update in _progress(updates)]
    stepped = [index for index, trial in enumerate(trials) if trial.alpha > 0]
    steps = [(trials[index].update, trials[index].alpha) for index in stepped]

    def together(n: int) -> float:
        with applied(weights, steps[:n]):
            return held_out.kl()

    kept, totals = roll_back(together, len(steps), settings.delta)
    for index in stepped[kept:]:
        trials[index] = replace(trials[index], state="rolled back: total too large", alpha=0.0)
    return Outcome(trials, totals)


def _try(update: Update, weights: HeadWeights, held_out: HeldOut, settings: RahSettings) -> Trial:
    if not update.edits:
        return Trial(update, "equals its anchors")

    def alone(alpha: float) -> float:
        with applied(weights, [(update, alpha)]):
            return held_out.kl()

    alpha, tried = largest_step(alone, settings.alpha_max, settings.delta, settings.halvings)
    return Trial(update, "calibrated" if alpha > 0 else "rolled back: no step holds", alpha, tried)


def _progress(updates: Sequence[Update]) -> tqdm:
    return tqdm(updates, desc="RAH-LoRA | trust region", unit="update")
