"""RAH-LoRA: training-free calibration of attention heads; the outcome is a PEFT adapter."""

from .api import calibrate

__all__ = ["calibrate"]
