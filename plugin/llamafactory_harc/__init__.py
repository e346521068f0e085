"""HARC (Harmfulness-And-Refusal Coupling, arXiv 2607.00572): a second method, built on llamafactory_hera.

HARC reads two directions, harm and refusal, in a chat model's residual stream, at the end of the prompt and over the
response. Training pushes harmful rows along the directions and benign rows off them, and keeps benign answers close to
the base model's. Read docs/harc.md before you use it.
"""
