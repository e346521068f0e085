"""Adds the chat templates of LLaVA-style models on the language models of the recipes.

Why: the host has its ``llava`` data plugin for the Vicuna format alone, and no template for LLaVA's stage 1. Can go
when the host has these templates.
"""

from typing import Any

from .registry import NOT_NEEDED

WHAT = "templates llava_plain, llava_qwen2_5, llava_qwen3, llava_llama3, llava_vicuna"


def check(module: Any) -> str | None:
    """Says what the host's module lacks, or None; nothing is needed where the host has all of them."""
    from llamafactory_hera.backbones.table import TEMPLATES
    from llamafactory_hera.integrations.llamafactory.templates import lacking

    lack = lacking(module)
    return NOT_NEEDED if lack is None and all(name in module.TEMPLATES for name in TEMPLATES) else lack


def apply(module: Any) -> None:
    """Registers the templates that the host does not have."""
    from llamafactory_hera.integrations.llamafactory.templates import register

    register(module)
