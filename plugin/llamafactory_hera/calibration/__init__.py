"""RAH-LoRA: calibrates attention heads without training and saves the result as a PEFT adapter.

Sections and equations are those of the paper (docs/calibration.md).
"""
