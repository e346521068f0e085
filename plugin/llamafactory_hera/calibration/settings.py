"""The ``rah_*`` keys of a calibration: each declared once, with its default, its help and what it may be.

Every default is the paper's, unless its help says "ours": there the paper is silent.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

PREFIX = "rah_"

Text = Literal["conversation", "prompt"]
Positions = Literal["text", "all", "last"]
TargetRule = Literal["paper", "no_caf", "random", "inverse"]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LAYERS = "first_half, all, or zero-based layers such as 0-15 or 3,5,8-11"


def _about(help: str, valid: Callable[[Any], bool] = lambda _: True, remedy: str = "") -> dict[str, Any]:
    return {"help": help, "valid": valid, "remedy": remedy}


def _count(help: str, least: int = 1) -> dict[str, Any]:
    return _about(help, lambda value: value >= least, f"{least} or more")


def _share(help: str, most: float = 1.0) -> dict[str, Any]:
    return _about(help, lambda value: 0 <= value <= most, f"a number from 0 to {most:g}")


@dataclass(frozen=True)
class RahSettings:
    """Settings of a calibration; a field ``x`` is the key ``rah_x``."""

    samples: int = field(
        default=100, metadata=_count("Image-text samples to draw, one for each image, held-out ones included.")
    )
    held_out: int = field(default=32, metadata=_count("How many of them only the trust region sees (ours)."))
    probes: int = field(default=32, metadata=_count("How many of the others CAF is computed on."))
    seed: int = field(default=0, metadata=_count("Of the draw of samples and of random targets.", least=0))
    batch_size: int = field(
        default=4, metadata=_count("Samples in a forward pass; halved when memory runs out (ours).")
    )
    text: Text = field(
        default="conversation",
        metadata=_about(
            "What the model reads beside the image: the whole conversation, whose answers are text like any other, or "
            "the prompt before the last answer (ours)."
        ),
    )
    positions: Positions = field(
        default="text",
        metadata=_about(
            "Tokens whose next-token distribution enters the margin loss and the KL: text tokens, all tokens, or the "
            "last one (ours)."
        ),
    )
    layers: str = field(default="first_half", metadata=_about(f"Layers that are calibrated: {_LAYERS}."))
    targets: TargetRule = field(
        default="paper",
        metadata=_about(
            "How targets are chosen: low I-SAL and high CAF (paper), low I-SAL alone (no_caf), as many at random "
            "(random), or high I-SAL and high CAF (inverse)."
        ),
    )
    p_isal: float = field(
        default=15.0,
        metadata=_share("Percentile of I-SAL in its layer below which a head is a candidate (eq. 6).", 100),
    )
    p_caf: float = field(
        default=70.0,
        metadata=_share("Percentile of CAF in its layer above which a candidate is a target (eq. 7).", 100),
    )
    caf_lambda: float = field(
        default=1.0,
        metadata=_about(
            "Weight of the squared gradients in CAF (eq. 5; ours).", lambda value: value >= 0, "0 or more"
        ),
    )
    beta: float = field(
        default=1.0,
        metadata=_about(
            "Standard deviations of I-SAL above its layer's mean beyond which a head is an anchor (eq. 8; ours).",
            lambda value: value >= 0,
            "0 or more: anchors look across text and image more than their layer's mean",
        ),
    )
    k: int = field(
        default=3, metadata=_count("Anchors for each target; 1 is the paper's ablation of the single nearest one.")
    )
    rho: float = field(
        default=0.6,
        metadata=_share(
            "Weight of functional against parametric similarity (eq. 9); 1 ablates the weights, 0 the attention."
        ),
    )
    w_v: float = field(default=0.7, metadata=_share("Weight of the value slice in parametric similarity (eq. 11)."))
    w_o: float = field(default=0.3, metadata=_share("Weight of the output slice in parametric similarity (eq. 11)."))
    trim: float = field(
        default=0.1,
        metadata=_about(
            "Fraction of anchors that is cut off at either end, element by element (eq. 12).",
            lambda value: 0 <= value < 0.5,
            "a number from 0 to below 0.5",
        ),
    )
    rank: int | Literal["full"] = field(
        default=8,
        metadata=_about(
            "Rank of a head's update (eq. 13), or full.",
            lambda value: value == "full" or value >= 1,
            "1 or more, or full",
        ),
    )
    delta: float = field(
        default=0.05,
        metadata=_about(
            "Bound on the mean KL divergence, in nats (eq. 15); 0 allows no change.",
            lambda value: value >= 0,
            "0 or more",
        ),
    )
    alpha_max: float = field(
        default=0.15,
        metadata=_about("Largest step, tried first (eq. 15).", lambda value: 0 < value <= 1, "above 0, up to 1"),
    )
    halvings: int = field(
        default=10, metadata=_count("How often the step is halved before its head is rolled back (ours).", least=0)
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            value = _typed(declared.name, getattr(self, declared.name), declared.type)
            if not declared.metadata["valid"](value):
                raise ValueError(
                    f"{PREFIX}{declared.name}: {value} is out of range; choose {declared.metadata['remedy']}."
                )
            object.__setattr__(self, declared.name, value)
        if self.samples - self.held_out < self.probes:
            raise ValueError(
                f"rah_samples: {self.samples} less rah_held_out: {self.held_out} leave {self.samples - self.held_out} "
                f"samples, fewer than rah_probes: {self.probes}; raise rah_samples or lower rah_probes."
            )
        if self.w_v + self.w_o == 0:
            raise ValueError("rah_w_v: 0 and rah_w_o: 0 leave no parametric similarity; raise one, or set rah_rho: 1.")
        if self.layers not in ("first_half", "all"):
            _parse_layers(self.layers)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "RahSettings":
        """Reads ``rah_*`` keys.

        Raises:
            ValueError: An unknown key, a value of another type or out of range; names the key and the remedy.
        """
        declared = {f"{PREFIX}{key.name}": key.name for key in fields(cls)}
        for key in values:
            if key not in declared:
                raise ValueError(f"{key}: there is no such key; calibration knows {', '.join(declared)}.")
        return cls(**{declared[key]: value for key, value in values.items()})

    def layer_indices(self, n_layers: int) -> list[int]:
        """The calibrated layers of a model of ``n_layers``, in order.

        Raises:
            ValueError: A layer that the model does not have.
        """
        if self.layers == "all":
            return list(range(n_layers))
        if self.layers == "first_half":
            return list(range(max(1, n_layers // 2)))
        chosen = _parse_layers(self.layers)
        if chosen[-1] >= n_layers:
            raise ValueError(
                f"rah_layers: {self.layers} names layer {chosen[-1]}, and this model has layers 0 to {n_layers - 1}."
            )
        return chosen

    @property
    def max_rank(self) -> int | None:
        """The rank bound; None for full rank."""
        return None if self.rank == "full" else self.rank


def _parse_layers(text: str) -> list[int]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"rah_layers: {text!r} cannot be read; write {_LAYERS}.")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(chosen)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value in the type of its key."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    integer = number and float(value).is_integer()
    if kind is str:
        if isinstance(value, list):  # a YAML list of layers
            value = ",".join(map(str, value))
        if isinstance(value, str) or integer:
            return str(value)
    elif kind is float and number:
        return float(value)
    elif kind is int and integer:
        return int(value)
    elif kind == int | Literal["full"]:
        if integer or value == "full":
            return int(value) if integer else value
    elif value in get_args(kind):
        return value
    wanted = {int: "a whole number", float: "a number", str: _LAYERS}.get(kind)
    if wanted is None:
        wanted = ", ".join(map(str, get_args(kind))) if kind != int | Literal["full"] else "a whole number, or full"
    if value is None:
        raise ValueError(f"{PREFIX}{name}: it has no value; choose {wanted}, or remove the key.")
    raise ValueError(f"{PREFIX}{name}: {value!r} is not possible; choose {wanted}.")
