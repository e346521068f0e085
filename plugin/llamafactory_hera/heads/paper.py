"""The heads that the paper aligned in each of its models (``hera_heads: paper``)."""

import os
from typing import Any

from ..files import BUILT

#: The value of ``hera_heads`` that denotes the heads of the paper.
PAPER = "paper"
#: A language model of the paper -> its heads, least aligned first, with DINOv2-L as the teacher (arXiv 2606.23885,
#: table 5).
PAPER_HEADS = {
    "Qwen/Qwen2.5-3B-Instruct": "L3H4,L5H11,L5H14,L5H9,L5H15",
    "Qwen/Qwen2.5-7B-Instruct": "L14H5,L4H7,L14H4,L4H10,L4H13",
    "Qwen/Qwen2.5-14B-Instruct": "L13H27,L18H13,L0H9,L0H7,L3H8",
    "Qwen/Qwen3-4B-Instruct-2507": "L7H6,L13H12,L3H6,L3H5,L13H13",
    "Qwen/Qwen3-8B": "L13H12,L7H6,L3H5,L13H13,L13H15",
    "Qwen/Qwen3-14B": "L14H24,L9H36,L9H32,L1H37,L1H36",
    "lmsys/vicuna-7b-v1.5": "L0H14,L1H1,L0H1,L0H3,L0H30",
    "lmsys/vicuna-13b-v1.5": "L0H38,L1H0,L0H11,L0H10,L0H26",
    "meta-llama/Meta-Llama-3-8B-Instruct": "L0H31,L2H21,L0H29,L2H23,L2H25",
}


def without_folder(name: str) -> str:
    """Returns a hub id unchanged, and only the last part of a local path, to keep the machine's folders private."""
    return os.path.basename(os.path.abspath(name)) if os.path.isabs(name) or os.path.isdir(name) else name


def paper_heads(configuration: Any) -> str:
    """Returns the heads that the paper aligned in a model, or raises ``ValueError`` for any other model.

    ``llamafactory-hera build`` writes the name of the language model into the configuration.
    """
    name = getattr(configuration, "_name_or_path", "")
    names = {without_folder(str(each)) for each in (name, getattr(configuration, BUILT, ""))}
    for checkpoint, heads in PAPER_HEADS.items():
        if names & {checkpoint, checkpoint.partition("/")[2]}:
            return heads
    why = f"supports {', '.join(PAPER_HEADS)}, and models built from them, but not {name or 'this model'}"
    raise ValueError(f"hera_heads: {PAPER} {why}; use auto.")
