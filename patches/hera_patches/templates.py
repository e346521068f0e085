"""Adds the chat templates of LLaVA-style models on the language models of the recipes.

Why: the host has its ``llava`` data plugin for the Vicuna format alone, and no template for LLaVA's stage 1. Can go
when the host has these templates.
"""

from typing import Any


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamafactory.templates import register

    register(module)
