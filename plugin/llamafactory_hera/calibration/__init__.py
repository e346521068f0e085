"""RAH-LoRA: training-free calibration of attention heads; the result is a PEFT adapter."""
