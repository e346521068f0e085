"""RAH-LoRA: training-free calibration of attention heads; the outcome is a PEFT adapter."""
