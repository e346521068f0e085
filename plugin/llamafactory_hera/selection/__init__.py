"""Head selection: scores every head against the teacher, chooses, writes the run's recipe, draws the pictures."""

from .api import score_checkpoint, select
from .report import write_report

__all__ = ["score_checkpoint", "select", "write_report"]
