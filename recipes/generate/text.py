"""Renders a recipe as YAML, with a header (requirements, command and memory) and the sections of keys."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .memory import Batches, Work
from .sections import Section

WIDTH = 118

#: Comments on keys whose purpose is not obvious.
_COMMENTS = {
    "freeze_multi_modal_projector": "LLaMA-Factory freezes it by default",
    "additional_target": "the projector, which lora_target: all does not include",
    "hera_memory": "see the table above",
    "gradient_accumulation_steps": "see the table above",
    "train_sampling_strategy": "batches samples of similar length; transformers 4 needs group_by_length: true",
    "media_dir": "image paths in the data are relative to this folder",
    "enable_thinking": "the data contain no thoughts, so the prompt ends with an empty thought",
    "default_system": "the template's default system message would turn thinking on",
    "use_reentrant_gc": "LLaMA-Factory's default would lose the gradients of keys and values that layers share",
}


@dataclass(frozen=True)
class Recipe:
    """A recipe file.

    Attributes:
        name: The file's name without ``.yaml``.
        title: A sentence that describes the recipe.
        needs: The requirements, each with a name and a source.
        work: The amount of training.
        plans: Ways to split the global batch; the keys are set for one of these plans.
        sections: The sections of keys.
        notes: A second paragraph for the header.
    """

    name: str
    title: str
    needs: Sequence[tuple[str, str]]
    work: Work
    plans: Sequence[Batches]
    sections: Sequence[Section]
    notes: str = ""

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of all sections."""
        return {key: value for _, section in self.sections for key, value in section.items()}

    def without_hera(self, name: str, title: str, output_dir: str, notes: str) -> "Recipe":
        """Returns the same run as plain supervised fine-tuning, with a different output folder."""
        changed = self.changed(stage="sft", output_dir=output_dir)
        sections = [section for section in changed.sections if section[0] != "hera"]
        needs = [need for need in self.needs if need[0] != self.keys["hera_teacher"]]
        return replace(self, name=name, title=title, needs=needs, sections=sections, notes=notes)

    def changed(self, **values: Any) -> "Recipe":
        """Returns the recipe with new values for some of its keys."""
        sections = [(name, {k: values.get(k, v) for k, v in keys.items()}) for name, keys in self.sections]
        return replace(self, sections=sections)


def render(recipe: Recipe) -> str:
    """Returns the text of the recipe's file."""
    command = f"llamafactory-cli train recipes/{recipe.name}.yaml"
    if "deepspeed" in recipe.keys:
        command = f"FORCE_TORCHRUN=1 {command}"
    lines = [*_wrap(recipe.title), "#", "# Requirements:"]
    width = max(len(name) for name, _ in recipe.needs) + 2
    for name, source in recipe.needs:
        lines += _wrap(f"{name:<{width}}{source}", "#   ", "#   " + " " * width)
    lines += ["#", "# Command:", f"#   {command}", "#", *_batches(recipe)]
    if recipe.notes:
        lines += ["#", *_wrap(recipe.notes)]
    for section, keys in recipe.sections:
        lines += ["", f"### {section}"]
        for key, value in keys.items():
            comment = f"  # {_COMMENTS[key]}" if key in _COMMENTS and (key, value) != ("hera_memory", 0) else ""
            lines.append(f"{key}: {_scalar(value)}{comment}")
    return "\n".join(lines) + "\n"


def _batches(recipe: Recipe) -> list[str]:
    """Describes the global batch, the ways to split it, and the memory that each split needs."""
    work, keys, hera = recipe.work, recipe.keys, "hera_memory" in recipe.keys
    text = f"Global batch {work.global_batch} = GPUs x per_device_train_batch_size x gradient_accumulation_steps."
    if hera:
        text += (
            " HeRA compares each sample with the others in the micro-batch across all GPUs, and with earlier samples, "
            "as many as hera_memory says."
        )
    lines = [*_wrap(text), "#", f"#   GPUs  per device  accumulation{'  hera_memory' if hera else ''}  memory per GPU"]
    chosen = (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"])
    for plan in recipe.plans:
        row = f"#   {plan.gpus:>4}  {plan.per_device:>10}  {plan.accumulation:>12}"
        row += f"  {plan.hera_memory:>11}" if hera else ""
        row += f"  {plan.gib:.0f} GB" + ("" if plan.fits else ", too much for one card: use LoRA")
        lines.append(row + ("  <- set below" if chosen == (plan.per_device, plan.accumulation) else ""))
    text = (
        f"Use GPUs with {work.card} GB. The memory figures are high estimates from tensor sizes for sequences of "
        f"{work.tokens} tokens, not measurements."
    )
    others = [plan for plan in recipe.plans if plan.fits and (plan.per_device, plan.accumulation) != chosen]
    if others:
        other = others[-1]
        values = {"per_device_train_batch_size": other.per_device, "gradient_accumulation_steps": other.accumulation}
        values |= {"hera_memory": other.hera_memory} if hera else {}
        settings = " ".join(f"{key}={value}" for key, value in values.items())
        text += f" For {other.gpus} GPUs, append {settings} to the command."
    if work.zero3:
        text += f" A checkpoint with optimizer state takes {work.checkpoint:.0f} GB."
    return [*lines, "#", *_wrap(text)]


def _wrap(text: str, first: str = "# ", others: str = "# ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
