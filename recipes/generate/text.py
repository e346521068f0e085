"""A recipe as text: a header that says what must exist, and the host's sections of keys."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .memory import Batches, Work
from .sections import Section

WIDTH = 118

#: Why a key stands in a recipe, where that is not plain.
_COMMENTS = {
    "freeze_multi_modal_projector": "the host freezes it otherwise",
    "additional_target": "the projector, which lora_target: all leaves out",
    "hera_memory": "recent samples as further candidates, see the table above",
    "gradient_accumulation_steps": "see the table above",
    "train_sampling_strategy": "rows of like length together; transformers 4 calls it group_by_length: true",
    "media_dir": "image paths in the data are relative to it",
}


@dataclass(frozen=True)
class Recipe:
    """One recipe file.

    Attributes:
        name: The file's name without ``.yaml``.
        title: What it does, one sentence.
        needs: What must exist: a name, and where it comes from.
        work: What is trained.
        plans: Ways to spread the global batch; one of them has the values of the keys.
        sections: The keys.
        notes: A further paragraph of the header.
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
        """All keys of all sections."""
        return {key: value for _, section in self.sections for key, value in section.items()}

    def without_hera(self, name: str, title: str, output_dir: str, notes: str) -> "Recipe":
        """The same run as plain supervised fine-tuning: without the ``hera_*`` keys, into another folder."""
        changed = {"stage": "sft", "output_dir": output_dir}
        sections = [
            (section, {key: changed.get(key, value) for key, value in keys.items()})
            for section, keys in self.sections
            if section != "hera"
        ]
        needs = [need for need in self.needs if need[0] != self.keys["hera_teacher"]]
        return replace(self, name=name, title=title, needs=needs, sections=sections, notes=notes)


def render(recipe: Recipe) -> str:
    """The text of the recipe's file."""
    command = f"llamafactory-cli train recipes/{recipe.name}.yaml"
    if "deepspeed" in recipe.keys:
        command = f"FORCE_TORCHRUN=1 {command}"
    lines = [*_wrap(recipe.title), "#", "# What must exist:"]
    width = max(len(name) for name, _ in recipe.needs) + 2
    for name, source in recipe.needs:
        lines += _wrap(f"{name:<{width}}{source}", "#   ", "#   " + " " * width)
    lines += ["#", "# Command:", f"#   {command}", "#", *_batches(recipe)]
    if recipe.notes:
        lines += ["#", *_wrap(recipe.notes)]
    for section, keys in recipe.sections:
        lines += ["", f"### {section}"]
        for key, value in keys.items():
            comment = f"  # {_COMMENTS[key]}" if key in _COMMENTS and value else ""
            if value is False and key == "freeze_multi_modal_projector":
                comment = f"  # {_COMMENTS[key]}"
            lines.append(f"{key}: {_scalar(value)}{comment}")
    return "\n".join(lines) + "\n"


def _batches(recipe: Recipe) -> list[str]:
    """Global batch, the ways to make it, and the memory that they take."""
    work, keys, hera = recipe.work, recipe.keys, "hera_memory" in recipe.keys
    text = f"Global batch {work.global_batch} = GPUs x per_device_train_batch_size x gradient_accumulation_steps."
    if hera:
        text += " HeRA compares a sample with the others of its micro-batch over all GPUs and with hera_memory more."
    lines = [*_wrap(text), "#", f"#   GPUs  per device  accumulation{'  hera_memory' if hera else ''}  memory a GPU"]
    chosen = (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"])
    for plan in recipe.plans:
        row = f"#   {plan.gpus:>4}  {plan.per_device:>10}  {plan.accumulation:>12}"
        row += f"  {plan.hera_memory:>11}" if hera else ""
        row += f"  {plan.gib:.0f} GB" + ("" if plan.fits else ", more than a card holds: use LoRA")
        lines.append(row + ("  <- below" if chosen == (plan.per_device, plan.accumulation) else ""))
    text = (
        f"For GPUs of {work.card} GB. The memory is computed from tensor sizes for sequences of {work.tokens} tokens, "
        "on the high side; it was not measured."
    )
    others = [plan for plan in recipe.plans if plan.fits and (plan.per_device, plan.accumulation) != chosen]
    if others:
        other = others[-1]
        values = {"per_device_train_batch_size": other.per_device, "gradient_accumulation_steps": other.accumulation}
        values |= {"hera_memory": other.hera_memory} if hera else {}
        text += f" For {other.gpus} GPUs append {' '.join(f'{key}={value}' for key, value in values.items())}."
    if work.zero3:
        text += f" A checkpoint with the optimizer's state takes {work.checkpoint:.0f} GB."
    return [*lines, "#", *_wrap(text)]


def _wrap(text: str, first: str = "# ", others: str = "# ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _scalar(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
