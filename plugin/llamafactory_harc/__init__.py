"""HARC (Harmfulness-And-Refusal Coupling, arXiv 2607.00572): a second method on the foundation of llamafactory_hera.

Two directions in the residual stream of a chat model, harm and refusal, are read at the end of the prompt and over the
response. Training pushes harmful rows along the directions and benign rows off them, and keeps benign answers close to
those of the base model. docs/harc.md says what to expect of it.
"""
