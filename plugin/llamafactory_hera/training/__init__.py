"""One run's alignment, for any training loop: from a model and its configuration to a loss term with gradient."""

from .aligner import Aligner, MicroBatch
from .collator import HeraCollator

__all__ = ["Aligner", "HeraCollator", "MicroBatch"]
