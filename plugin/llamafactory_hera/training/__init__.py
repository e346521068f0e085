"""One run's alignment for any training loop: turns a model and its configuration into a loss term with gradient."""

from .aligner import Aligner
from .collator import HeraCollator
from .term import Prepared

__all__ = ["Aligner", "HeraCollator", "Prepared"]
