# No `from __future__ import annotations` here: the annotations are read as types.
"""The ``rah_*`` keys of a calibration. A default is the paper's, unless the help says "ours": there it is silent."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..keys import KeyedConfig, knob

Text = Literal["conversation", "prompt"]
Positions = Literal["text", "all", "last"]

_LAYERS = "first_half, all, or zero-based layers such as 0-15 or 3,5,8-11"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class RahConfig(KeyedConfig):
    """Keys of a calibration; a field ``x`` is the key ``rah_x``.

    Raises:
        ValueError: A value is impossible or does not fit another; names the key, the value and the remedy.
    """

    PREFIX: ClassVar[str] = "rah_"

    samples: int = knob(100, "Image-text samples to draw, one for each image, held-out ones included.", at_least=1)
    held_out: int = knob(32, "How many of them only the trust region sees (ours).", at_least=1)
    probes: int = knob(32, "How many of the others CAF is computed on.", at_least=1)
    seed: int = knob(0, "Of the draw of samples and of random targets.", at_least=0)
    batch_size: int = knob(4, "Samples in a forward pass; halved when memory runs out (ours).", at_least=1)
    text: Text = knob(
        "conversation",
        "What the model reads beside the image: the whole conversation, whose answers are text like any other, or the "
        "prompt before the last answer (ours).",
    )
    positions: Positions = knob(
        "text",
        "Tokens whose next-token distribution enters the margin loss and the KL: text tokens, all tokens, or the last "
        "one (ours).",
    )
    layers: str = knob("first_half", f"Layers that are calibrated: {_LAYERS}.")
    targets: Literal["paper", "no_caf", "random", "inverse"] = knob(
        "paper",
        "How targets are chosen: low I-SAL and high CAF (paper), low I-SAL alone (no_caf), as many at random "
        "(random), or high I-SAL and high CAF (inverse).",
    )
    p_isal: float = knob(
        15.0, "Percentile of I-SAL in its layer below which a head is a candidate (eq. 6).", at_least=0, at_most=100
    )
    p_caf: float = knob(
        70.0, "Percentile of CAF in its layer above which a candidate is a target (eq. 7).", at_least=0, at_most=100
    )
    caf_lambda: float = knob(1.0, "Weight of the squared gradients in CAF (eq. 5; ours).", at_least=0)
    beta: float = knob(
        1.0,
        "Standard deviations of I-SAL above its layer's mean beyond which a head is an anchor (eq. 8; ours).",
        at_least=0,
        hint="anchors look across text and image more than their layer's mean",
    )
    update: Literal["calibrate", "prune"] = knob(
        "calibrate",
        "What happens to targets: they move towards anchors (calibrate), or their output is removed, whatever the KL "
        "(prune, a baseline of the paper).",
    )
    k: int = knob(3, "Anchors for each target; 1 is the paper's ablation of the single nearest one.", at_least=1)
    rho: float = knob(
        0.6,
        "Weight of functional against parametric similarity (eq. 9); 1 ablates the weights, 0 the attention.",
        at_least=0,
        at_most=1,
    )
    w_v: float = knob(0.7, "Weight of the value slice in parametric similarity (eq. 11).", at_least=0, at_most=1)
    w_o: float = knob(0.3, "Weight of the output slice in parametric similarity (eq. 11).", at_least=0, at_most=1)
    trim: float = knob(
        0.1, "Fraction of anchors that is cut off at either end, element by element (eq. 12).", at_least=0, below=0.5
    )
    rank: int | Literal["full"] = knob(8, "Rank of a head's update (eq. 13), or full.", at_least=1, hint="or full")
    delta: float = knob(0.05, "Bound on the mean KL divergence, in nats (eq. 15); 0 allows no change.", at_least=0)
    alpha_max: float = knob(0.15, "Largest step, tried first (eq. 15).", above=0, at_most=1)
    halvings: int = knob(10, "How often the step is halved before its head is rolled back (ours).", at_least=0)

    def check(self) -> None:
        """Checks keys against each other, and the syntax of the layers."""
        profiled = self.samples - self.held_out
        if profiled < self.probes:
            raise ValueError(
                f"rah_samples: {self.samples} less rah_held_out: {self.held_out} leave {profiled} samples, fewer than "
                f"rah_probes: {self.probes}; raise rah_samples, or lower rah_held_out or rah_probes."
            )
        if self.w_v + self.w_o == 0:
            raise ValueError("rah_w_v: 0 and rah_w_o: 0 leave no parametric similarity; raise one, or set rah_rho: 1.")
        if self.layers not in ("first_half", "all"):
            _parse_layers(self.layers)

    def layer_indices(self, n_layers: int) -> list[int]:
        """The calibrated layers of a model of ``n_layers``, in order; refuses a layer that it does not have."""
        if self.layers in ("all", "first_half"):
            return list(range(n_layers if self.layers == "all" else max(1, n_layers // 2)))
        chosen = _parse_layers(self.layers)
        if chosen[-1] >= n_layers:
            raise ValueError(
                f"rah_layers: {self.layers} names layer {chosen[-1]}, and this model has layers 0 to {n_layers - 1}."
            )
        return chosen


def _parse_layers(text: str) -> list[int]:
    chosen: set[int] = set()
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"rah_layers: {text!r} cannot be read; write {_LAYERS}.")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(chosen)
