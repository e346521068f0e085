"""Adds the chat templates of LLaVA-style models on the language models of the recipes.

Why: the host has its ``llava`` data plugin for the Vicuna format alone, and no template for LLaVA's stage 1. Can go
when the host has these templates.
"""

from typing import Any

WHAT = "templates llava_plain, llava_qwen2_5, llava_qwen3, llava_llama3, llava_vicuna"


def apply(module: Any) -> None:
    from llamafactory_hera.integrations.llamafactory.templates import register

    register(module)
