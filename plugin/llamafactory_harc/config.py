# No `from __future__ import annotations` here: the annotations are read as types.
"""Declares every ``harc_*`` key of a run."""

import re
from dataclasses import dataclass
from typing import ClassVar

from llamafactory_hera.keys import KeyedConfig, knob

#: The value of ``harc_directions`` or ``harc_layers`` that lets the run find them.
AUTO = "auto"


@dataclass(frozen=True)
class HarcConfig(KeyedConfig):
    """The settings of a HARC run: the field ``x`` is the key ``harc_x``.

    The defaults are those of the authors' Llama configuration. Steps are optimizer steps; the authors count
    micro-batches, of which they accumulate two.
    """

    PREFIX: ClassVar[str] = "harc_"

    column: str = knob(
        "kind",
        "Column of the dataset that says what a row is: harmful (a harmful prompt and its refusal), harmless or "
        "pseudo (a benign prompt, in pseudo one that looks harmful, and its answer), or compliant (a harmful prompt "
        "and an answer that complies; such rows only define a direction). Without the column, the dataset's name "
        "must contain one of these words.",
    )
    directions: str = knob(
        AUTO,
        "Directions of the base model: auto extracts them at the start of a run; or give the path of the "
        "directions.safetensors that llamafactory-hera harc-directions wrote.",
    )
    layers: str = knob(
        AUTO,
        "Layers to couple. auto takes those with the highest scores, again after every refresh; or give numbers such "
        "as 25,26, counted as in the paper: layer 25 is the input of block 25, that is, the output of block 24.",
    )
    n_layers: int = knob(2, "Number of layers that auto takes.", at_least=1, at_most=1000)
    late_layers: int = knob(
        4, "Number of layers that auto takes from step harc_late_from on.", at_least=1, at_most=1000
    )
    late_from: int = knob(500, "The step from which on auto takes harc_late_layers layers.", at_least=0)
    margin: float = knob(
        0.5, "Cosine above which harmful rows are pushed; benign rows go below 0.", at_least=0, at_most=1
    )
    coupling_weight: float = knob(1.0, "Weight of the coupling at the prompt.", at_least=0, at_most=1000)
    response_weight: float = knob(1.0, "Weight of the coupling over the response.", at_least=0, at_most=1000)
    kl_weight: float = knob(10.0, "Weight of the KL term, which keeps benign answers.", at_least=0, at_most=1000)
    refresh: int = knob(
        100, "Steps after which the directions are extracted again; 0 keeps those of the base.", at_least=0
    )
    refresh_share: float = knob(
        0.3, "Share of the new directions after a refresh; the rest is the base model's.", at_least=0, at_most=1
    )
    window: int = knob(32, "Number of response tokens over which the response is read.", at_least=1)
    length: int = knob(
        256,
        "Tokens kept of a prompt, and of a response besides its end token. A longer prompt loses its beginning.",
        at_least=8,
    )
    extract_samples: int = knob(
        300,
        "Rows of each class from which the directions are extracted, at most half of the class. Harmful and harmless "
        "rows among them are not trained on.",
        at_least=1,
        at_most=10**6,
    )
    extract_batch_size: int = knob(8, "Rows per device in each forward pass of the extraction.", at_least=1)

    @property
    def named_layers(self) -> tuple[int, ...] | None:
        """The layers in ascending order, or None if the scores decide."""
        if self.layers == AUTO:
            return None
        return tuple(sorted({int(number) for number in re.split(r"[,\s]+", self.layers.strip())}))

    def check(self) -> None:
        """Checks the names of layers."""
        if self.layers != AUTO and not re.fullmatch(r"\s*[1-9]\d{0,4}([,\s]+[1-9]\d{0,4})*\s*", self.layers):
            raise ValueError(f"harc_layers: {self.layers!r} is not a list of layers; write auto, or numbers: 25,26.")

    def count_at(self, step: int) -> int:
        """Returns the number of layers that are chosen at a step."""
        return self.late_layers if step >= self.late_from else self.n_layers
