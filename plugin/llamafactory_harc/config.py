# No `from __future__ import annotations` here: the annotations are read as types.
"""Declares every ``harc_*`` key of a run."""

from dataclasses import dataclass
from typing import ClassVar

from llamafactory_hera.heads.targets import AUTO, Targets
from llamafactory_hera.keys import KeyedConfig, knob


@dataclass(frozen=True)
class HarcConfig(KeyedConfig):
    """The settings of a HARC run; the field ``x`` is the key ``harc_x``. The defaults are the authors', for Llama."""

    # steps are optimizer steps; the authors count micro-batches, of which a step has two
    PREFIX: ClassVar[str] = "harc_"

    column: str = knob(
        "kind",
        "Column with the class of a row: harmful (with a refusal as response), harmless, pseudo (a harmless prompt "
        "that looks harmful), or compliant (a harmful prompt that is answered; such rows only define a direction). "
        "Without the column, the name of the dataset must contain the class.",
    )
    directions: str = knob(
        AUTO,
        "Directions of the base model: auto extracts them at the start of a run; or give the path of the "
        "directions.safetensors that llamafactory-hera harc-directions wrote.",
    )
    layers: str = knob(
        AUTO,
        "Layers to couple. auto takes those with the highest scores, again after every refresh; or give names such as "
        "L25,L26. As in the paper, L25 is the input of block 25, which is the output of block 24.",
    )
    n_layers: int = knob(2, "Number of layers that auto takes.", at_least=1)
    late_layers: int = knob(4, "Number of layers that auto takes from step harc_late_from on.", at_least=1)
    late_from: int = knob(500, "The step from which on auto takes harc_late_layers layers.", at_least=0)
    margin: float = knob(
        0.5, "The loss pushes cosines of harmful rows above this, others to 0.", at_least=0, at_most=1
    )
    coupling_weight: float = knob(1.0, "Weight of the coupling at the prompt.", at_least=0)
    response_weight: float = knob(1.0, "Weight of the coupling over the response.", at_least=0)
    kl_weight: float = knob(10.0, "Weight of the KL term, which keeps benign answers.", at_least=0)
    refresh: int = knob(100, "Number of steps between extractions of directions; 0 never repeats them.", at_least=0)
    refresh_share: float = knob(0.3, "Share of new directions in their mixture with the base model's.", at_most=1)
    window: int = knob(32, "Number of tokens at the start of a response that HARC averages.", at_least=1)
    length: int = knob(
        256,
        "Maximum length of a prompt, which loses its beginning, and of a response, which keeps its end token.",
        at_least=8,
    )
    extract_samples: int = knob(
        300, "Rows of each class, at most half of them, that define the directions and are not trained on.", at_least=1
    )

    @property
    def named_layers(self) -> tuple[int, ...]:
        """The layers in ascending order; empty if the scores decide."""
        return () if self.layers == AUTO else Targets.parse(self.layers, "layer", key="harc_layers").layers

    def check(self) -> None:
        """Checks the names of layers."""
        if 0 in self.named_layers:
            raise ValueError("harc_layers: L0 is the embeddings; choose later layers.")
