"""RAH-LoRA: calibrates attention heads without training and saves the result as a PEFT adapter.

Section and equation numbers refer to the paper that docs/calibration.md cites.
"""
