"""The model card of a finished run: tags, and a section on the alignment, also stored as ``hera/card.json``."""

import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files import CARD, RUN_FOLDER, read_json, reading, write_json, write_text
from ..heads.families import model_config
from ..heads.targets import file_name
from ..selection.firmness import Firmness, markdown_table
from ..selection.report import Comparison
from ..selection.scores import ScoreFile, command_line, package_versions
from .messages import compared_at_once, neighbors_taken

_PAPER = "https://arxiv.org/abs/2606.23885"
_CITATION = """@article{caffagni2026hera,
  title   = {Mind the Heads: Topological Representation Alignment for Multimodal LLMs},
  author  = {Caffagni, Davide and Compagnoni, Alberto and Melis, Federico and Sarto, Sara and Dovesi, Pier Luigi and
             Granroth-Wilding, Mark and Cornia, Marcella and Baraldi, Lorenzo},
  journal = {arXiv preprint arXiv:2606.23885},
  year    = {2026}
}"""
_PAGE = "README.md"
_BEGIN, _END = "<!-- llamafactory-hera -->", "<!-- /llamafactory-hera -->"
#: Logged values that the card shows, with their titles.
_CURVES = {
    "hera_mknn": "MKNN in training batches",
    "hera_mknn_chance": "MKNN of unrelated features",
    "lm_loss": "language-modeling loss",
    "hera_loss": "alignment loss, unweighted",
    "hera_temperature": "temperature",
}


def write_card(trainer: Any) -> None:
    """Writes ``hera/card.json``, and adds the tags and the section on the alignment to a run's ``README.md``."""
    folder, content = Path(trainer.args.output_dir), _content(trainer)
    with suppress(ValueError):  # the heads were written by hand, so their scores before training are unknown
        file = ScoreFile.load(folder / RUN_FOLDER / file_name(trainer.aligner.targets.granularity))
        content |= _values(Comparison([file], ["before"], trainer.aligner.targets, "aligned"))
        content["firmness"] = file.firmness._asdict()
    card = _with_section(folder, content)
    data: Any = card.data
    data.pipeline_tag = content["task"]
    data.tags = list(dict.fromkeys([*(data.tags or []), "hera"]))
    data.datasets = list(dict.fromkeys([*(data.datasets or []), *trainer.hub_datasets])) or None
    if isinstance(data.base_model, str) and Path(data.base_model).is_dir():
        data.base_model = None  # the hub would read the path as the name of a model
    write_text(folder / _PAGE, str(card))


def add_scores(folder: Path, scores: Comparison) -> None:
    """Adds the scores of a finished run to its ``hera/card.json`` and to the section in its ``README.md``."""
    path = folder / RUN_FOLDER / CARD
    if path.is_file():
        with reading(path, "the card of a run"):
            write_text(folder / _PAGE, str(_with_section(folder, read_json(path) | _values(scores))))


def _values(scores: Comparison) -> dict[str, Any]:
    return {"scores": {"setting": scores.files[-1].setting, "names": list(scores.names), "mknn": scores.rows}}


def _with_section(folder: Path, content: dict[str, Any]) -> ModelCard:
    """Writes ``hera/card.json``, and returns the card in ``README.md`` with the section added or replaced."""
    write_json(folder / RUN_FOLDER / CARD, content)
    page = folder / _PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else "---\n{}\n---\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    others = re.sub(rf"\n*{_BEGIN}.*?{_END}\n*", "\n", card.text, flags=re.DOTALL).strip("\n")
    card.text = "\n\n".join(filter(None, [others, f"{_BEGIN}\n{_section(content)}\n{_END}\n"]))
    return card


def _content(trainer: Any) -> dict[str, Any]:
    """Collects the aligned heads or layers, the teacher, the settings and the logged values, if known."""
    aligner, state, best = trainer.aligner, trainer.state, trainer.best_step
    config, targets, architecture = aligner.config, aligner.targets, model_config(trainer.model)
    multimodal = architecture.get_text_config() is not architecture
    # hera_loss is 0 if no sample could be compared; it is missing until the memory is full.
    lines = (line for line in state.log_history if "lm_loss" in line and line.get("hera_loss") != 0)
    content: dict[str, Any] = {
        targets.plural: list(targets.names),
        "objective": config.objective,
        "weight": config.weight,
        "teacher": config.teacher,
        "teacher_fingerprint": aligner.teacher.encoder.fingerprint,
        "steps": state.global_step,
        "log": [{name: line[name] for name in ("step", *_CURVES) if name in line} for line in lines],
        "command": command_line(),
        "versions": package_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "paper": _PAPER,
        "task": "image-text-to-text" if multimodal else "text-generation",
        "usage": _usage(trainer, multimodal),
    }
    if best not in (None, state.global_step):
        content["weights_of_step"] = best
    if config.reads("hera_memory"):
        memory, taken = aligner.memory.size or 0, config.k  # the number of samples in packed rows is unknown
        if not aligner.packed:
            taken = neighbors_taken(config.k, compared_at_once(aligner, trainer.args), memory)
        content |= {"k": taken, "memory": memory}
    return content


def _usage(trainer: Any, multimodal: bool) -> str:
    """Returns the code that loads the model, or the adapter on its base model."""
    model_class, processor_class = "AutoModelForCausalLM", "AutoTokenizer"
    if multimodal:
        model_class, processor_class = "AutoModelForImageTextToText", "AutoProcessor"
    name = trainer.args.hub_model_id or trainer.args.output_dir
    adapters = [each for module in trainer.model.modules() for each in getattr(module, "peft_config", {}).values()]
    base = adapters[0].base_model_name_or_path if adapters else name
    lines = [
        f"from transformers import {model_class}, {processor_class}\n",
        f'processor = {processor_class}.from_pretrained("{name}")',
        f'model = {model_class}.from_pretrained("{base}", dtype="auto")',
    ]
    if adapters:
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{name}")']
    return "\n".join(lines)


def _section(content: dict[str, Any]) -> str:
    """Renders the section as Markdown."""
    kind = "heads" if "heads" in content else "layers"
    aligned = (
        f"HeRA aligned {kind} {', '.join(content[kind])} with {content['teacher']} in {content['steps']} steps "
        f"(objective {content['objective']}, weight {content['weight']})."
    )
    if "weights_of_step" in content:
        aligned += f" The weights are from the best step, {content['weights_of_step']}."
    parts = ["## Alignment with a vision encoder", aligned]
    if log := content["log"]:
        rows = [["measured in training", "first logged", "last logged"]]
        for name, title in _CURVES.items():
            if values := [line[name] for line in log if name in line]:
                rows.append([title, f"{values[0]:.4g}", f"{values[-1]:.4g}"])
        parts.append(markdown_table(rows))
    if "memory" in content:
        remembered = f" and with up to {content['memory']} remembered samples" if content["memory"] else ""
        parts.append(f"During training, MKNN compares each sample with the others in its batch{remembered}.")
    if scores := content.get("scores"):
        rows = [["MKNN with the teacher", *scores["names"]]]
        rows += [[name, *(f"{value:.4f}" for value in mknn)] for name, mknn in scores["mknn"].items()]
        parts += [markdown_table(rows), f"Measured on {scores['setting']}."]
        if scores["names"] == ["before"]:
            parts.append("`llamafactory-hera score` measures the trained model.")
    if "firmness" in content:
        parts += [f"The selection of the {kind}, before training:", Firmness(**content["firmness"]).markdown]
    parts.append(f"```python\n{content['usage']}\n```")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts.append(f"Versions: {versions}. `{RUN_FOLDER}/{CARD}` contains the same values and all log lines.")
    parts.append(f"Method: Head-Wise Representation Alignment (HeRA), [arXiv 2606.23885]({_PAPER}).")
    return "\n\n".join([*parts, f"```bibtex\n{_CITATION}\n```"])
