"""The alignment of a run for any training loop, from a model and a configuration to a loss term with gradients."""

from .aligner import Aligner
from .collator import HeraCollator
from .term import Prepared

__all__ = ["Aligner", "HeraCollator", "Prepared"]
