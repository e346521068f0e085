# Do not import `annotations` from `__future__` here: KeyedConfig reads the annotations as types.
"""The ``rah_*`` keys of a calibration. Defaults are the paper's unless a key's help text says "ours"."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..keys import KeyedConfig, knob

Text = Literal["conversation", "prompt"]
Positions = Literal["text", "all", "last"]

_LAYERS = "first_half, all, or zero-based layers such as 0-15 or 3,5,8-11"
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class RahConfig(KeyedConfig):
    """The keys of a calibration; the field ``x`` is the key ``rah_x``."""

    PREFIX: ClassVar[str] = "rah_"

    samples: int = knob(
        100, "Number of samples to draw, including the held-out ones; no image is drawn twice.", at_least=1
    )
    held_out: int = knob(32, "Number of drawn samples reserved for the trust region (ours).", at_least=1)
    probes: int = knob(32, "Number of samples for CAF, taken from the samples that are not held out.", at_least=1)
    seed: int = knob(0, "Seed of the sample draw and of randomly chosen heads.", at_least=0)
    batch_size: int = knob(4, "Samples per forward pass; halved when memory runs out (ours).", at_least=1)
    text: Text = knob(
        "conversation", "Text to read: the conversation with its answers, or the prompt of the last answer (ours)."
    )
    positions: Positions = knob(
        "text", "Tokens that count in the margin loss and the KL divergence: text, all, or only the last (ours)."
    )
    layers: str = knob("first_half", f"Layers whose heads may be calibrated: {_LAYERS}.")
    targets: Literal["paper", "no_caf", "random", "inverse"] = knob(
        "paper",
        "Heads to calibrate: low I-SAL and high CAF (paper), only low I-SAL (no_caf), as many random heads "
        "(random), or high I-SAL and high CAF (inverse).",
    )
    p_isal: float = knob(
        15.0, "Candidates have an I-SAL below this percentile of their layer (eq. 6).", at_least=0, at_most=100
    )
    p_caf: float = knob(
        70.0, "Chosen candidates have a CAF above this percentile of their layer (eq. 7).", at_least=0, at_most=100
    )
    caf_lambda: float = knob(1.0, "Weight of the squared gradients in CAF (eq. 5; ours).", at_least=0)
    beta: float = knob(
        1.0,
        "An anchor's I-SAL must exceed its layer's mean by this many standard deviations (eq. 8; ours).",
        at_least=0,
    )
    update: Literal["calibrate", "prune"] = knob(
        "calibrate",
        "How to change the chosen heads: move them toward their anchors (calibrate), or remove their output "
        "regardless of the KL divergence (prune, a baseline of the paper).",
    )
    k: int = knob(3, "Anchors per head; 1 keeps only the most similar anchor, an ablation in the paper.", at_least=1)
    rho: float = knob(
        0.6, "Weight of functional similarity (eq. 9); 1 ignores the weights, 0 the attention.", at_least=0, at_most=1
    )
    w_v: float = knob(0.7, "Weight of the value slices in parametric similarity (eq. 11).", at_least=0, at_most=1)
    w_o: float = knob(0.3, "Weight of the output slices in parametric similarity (eq. 11).", at_least=0, at_most=1)
    trim: float = knob(
        0.1,
        "Fraction of values to cut at each end of the trimmed mean over anchors (eq. 12).",
        at_least=0,
        at_most=0.49,
    )
    rank: int | Literal["full"] = knob(8, "Rank of a head's update (eq. 13); full sets no limit.", at_least=1)
    delta: float = knob(0.05, "Bound on the mean KL divergence in nats (eq. 15); 0 allows no change.", at_least=0)
    alpha_max: float = knob(0.15, "Largest step size, which is tried first (eq. 15).", at_least=0, at_most=1)
    halvings: int = knob(10, "Number of times to halve a step size before rolling its update back (ours).", at_least=0)

    def check(self) -> None:
        """Checks the keys against each other, and the syntax of the layers."""
        profiled = self.samples - self.held_out
        if profiled < self.probes:
            raise ValueError(
                f"rah_samples: {self.samples} minus rah_held_out: {self.held_out} leaves {profiled} samples, fewer "
                f"than rah_probes: {self.probes}; raise rah_samples, or lower rah_held_out or rah_probes."
            )
        if self.w_v + self.w_o == 0 and self.rho < 1:
            raise ValueError("rah_w_v: 0 and rah_w_o: 0 leave no parametric similarity; raise one, or set rah_rho: 1.")
        _named_layers(self.layers, 0)

    def layer_indices(self, n_layers: int) -> list[int]:
        """Lists the layers to calibrate in a model with ``n_layers``; raises ``ValueError`` if the model lacks one."""
        chosen = _named_layers(self.layers, n_layers)
        if chosen[-1] >= n_layers:
            raise ValueError(f"rah_layers: the model has no layer {chosen[-1]}; choose from 0 to {n_layers - 1}.")
        return chosen


def _named_layers(text: str, n_layers: int) -> list[int]:
    if text in ("all", "first_half"):
        return list(range(n_layers if text == "all" else max(1, n_layers // 2)))
    chosen: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"rah_layers: {text!r} cannot be read; write {_LAYERS}.")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(chosen)
