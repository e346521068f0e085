"""The backbones that HeRA is run on, the assembly of a LLaVA-style model from an LLM, and the recipes of both."""
