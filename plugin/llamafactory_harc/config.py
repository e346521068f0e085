# No `from __future__ import annotations` here: the annotations are read as types.
"""Declares every ``harc_*`` key of a run."""

from dataclasses import dataclass
from typing import ClassVar

from llamafactory_hera.heads.targets import AUTO, Targets
from llamafactory_hera.keys import KeyedConfig, knob


@dataclass(frozen=True)
class HarcConfig(KeyedConfig):
    """The settings of a HARC run; the field ``x`` is the key ``harc_x``. Defaults are the authors' for Llama."""

    # steps are optimizer steps, but the authors count micro-batches, two per step
    PREFIX: ClassVar[str] = "harc_"

    column: str = knob(
        "kind",
        "Column with each row's class: harmful (its response is a refusal), harmless, pseudo (a harmless prompt that "
        "looks harmful), or compliant (an answered harmful prompt; compliant rows only define a direction). "
        "Without this column, the dataset's name must contain the class.",
    )
    directions: str = knob(
        AUTO,
        "Directions of the base model: auto extracts them at the start of a run. Otherwise, give the path of a "
        "directions.safetensors written by llamafactory-hera harc-directions.",
    )
    layers: str = knob(
        AUTO,
        "Layers to couple: auto chooses the highest-scoring layers, again after every refresh. Otherwise, give names "
        "such as L25,L26. As in the paper, L25 is the input of block 25, which is the output of block 24.",
    )
    n_layers: int = knob(2, "Number of layers that auto chooses.", at_least=1)
    late_layers: int = knob(4, "Number of layers that auto chooses from step harc_late_from on.", at_least=1)
    late_from: int = knob(500, "First step at which auto chooses harc_late_layers layers.", at_least=0)
    margin: float = knob(
        0.5, "The loss pushes harmful rows' cosines above this, others below 0.", at_least=0, at_most=1
    )
    coupling_weight: float = knob(1.0, "Weight of the coupling at the prompt.", at_least=0)
    response_weight: float = knob(1.0, "Weight of the coupling over the response.", at_least=0)
    kl_weight: float = knob(10.0, "Weight of the KL term, which preserves benign answers.", at_least=0)
    refresh: int = knob(100, "Number of steps between extractions of directions; 0 never refreshes them.", at_least=0)
    refresh_share: float = knob(0.3, "Share of new directions when mixed with the base model's.", at_most=1)
    window: int = knob(32, "Number of tokens that HARC averages at the start of a response.", at_least=1)
    length: int = knob(
        256,
        "Maximum number of tokens in a prompt, which loses its beginning, or a response, which keeps its end token.",
        at_least=8,
    )
    extract_samples: int = knob(
        300, "Rows per class (at most half of it) that define the directions and are not trained on.", at_least=1
    )

    @property
    def named_layers(self) -> tuple[int, ...]:
        """The named layers in ascending order; empty if the scores choose them."""
        return () if self.layers == AUTO else Targets.parse(self.layers, "layer", key="harc_layers").layers

    def check(self) -> None:
        """Checks the layer names."""
        if 0 in self.named_layers:
            raise ValueError("harc_layers: L0 is the embeddings; choose later layers.")
