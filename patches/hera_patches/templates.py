"""Adds the chat templates of LLaVA-style models on other LLMs than Vicuna.

Why: the host has its ``llava`` data plugin for the Vicuna format alone.

Tested with 0.9.5. Can go when the host has these templates.
"""

from types import ModuleType

WHAT = "templates llava_qwen2_5, llava_qwen3, llava_llama3, llava_plain"


def check(module: ModuleType) -> str | None:
    """Says what the host's module lacks, or None."""
    missing = [name for name in ("register_template", "TEMPLATES", "StringFormatter") if not hasattr(module, name)]
    return f"no {', '.join(missing)}" if missing else None


def apply(module: ModuleType) -> None:
    """Registers the templates that the host does not have."""
    from llamafactory_hera.host.templates import register

    register(module)
