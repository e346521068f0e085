"""The table of backbones, the assembly of LLaVA-style models, and the shipped recipes."""
