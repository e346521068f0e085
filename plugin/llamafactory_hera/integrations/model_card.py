"""The model card of a finished run: tags, a section on the alignment, and the same content as ``hera/card.json``."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files import CARD, RUN_FOLDER, write_json, write_text
from ..selection.scores import command_line, package_versions

_PAPER = "https://arxiv.org/abs/2606.23885"
_CITATION = """@article{caffagni2026hera,
  title   = {Mind the Heads: Topological Representation Alignment for Multimodal LLMs},
  author  = {Caffagni, Davide and Compagnoni, Alberto and Melis, Federico and Sarto, Sara and Dovesi, Pier Luigi and
             Granroth-Wilding, Mark and Cornia, Marcella and Baraldi, Lorenzo},
  journal = {arXiv preprint arXiv:2606.23885},
  year    = {2026}
}"""
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
    write_json(folder / RUN_FOLDER / CARD, content)
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "---\n{}\n---\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    others = re.sub(rf"\n*{_BEGIN}.*?{_END}\n*", "\n", card.text, flags=re.DOTALL).strip("\n")
    card.text = "\n\n".join(filter(None, [others, f"{_BEGIN}\n{_section(content)}\n{_END}\n"]))
    data: Any = card.data
    tags = [*(data.tags or []), "hera", content["objective"].rpartition(":")[2]]
    data.tags = list(dict.fromkeys(tags + ["llamafactory"] * ("llama-factory" in tags)))
    data.datasets = list(dict.fromkeys([*(data.datasets or []), *trainer.hub_datasets])) or None
    if isinstance(data.base_model, str) and Path(data.base_model).is_dir():
        data.base_model = None  # the hub would read the path as the name of a model
    write_text(page, str(card))


def _content(trainer: Any) -> dict[str, Any]:
    """Collects the aligned heads or layers, the teacher, the settings and the logged values; omits unknown ones."""
    aligner, state, best = trainer.aligner, trainer.state, trainer.best_step
    config, targets = aligner.config, aligner.targets
    compared = (line for line in state.log_history if line.get("hera_loss"))  # 0 if no sample could be compared
    content: dict[str, Any] = {
        targets.what: list(targets.names),
        "objective": config.objective,
        "weight": config.weight,
        "teacher": config.teacher,
        "teacher_fingerprint": aligner.teacher.encoder.fingerprint,
        "steps": state.global_step,
        "log": [{name: line[name] for name in ("step", *_CURVES) if name in line} for line in compared],
        "command": command_line(),
        "versions": package_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "paper": _PAPER,
    }
    if best not in (None, state.global_step):
        content["weights_of_step"] = best
    if config.reads("hera_memory"):
        content |= {"k": config.k, "memory": aligner.memory.size}
    by_head = targets.granularity == "head"
    if scores := targets.provenance.get("scores" if by_head else "layer_scores"):
        names = ("keys", "samples", "chance_level", "dataset", "date")
        mknn = {str(item): scores[item.layer][item.head] if by_head else scores[item.layer] for item in targets.items}
        content["selection"] = {name: targets.provenance.get(name) for name in names} | {"mknn": mknn}
    return content


def _section(content: dict[str, Any]) -> str:
    """Renders the section as Markdown."""
    what = "heads" if "heads" in content else "layers"
    aligned = (
        f"HeRA aligned {what} {', '.join(content[what])} with {content['teacher']} in {content['steps']} steps "
        f"(objective {content['objective']}, weight {content['weight']})."
    )
    if "weights_of_step" in content:
        aligned += f" The weights are those of step {content['weights_of_step']}, the best one."
    parts = ["## Alignment with a vision encoder", aligned]
    if log := content["log"]:
        rows = ["| measured in training | first logged | last logged |", "|---|--:|--:|"]
        for name, title in _CURVES.items():
            if values := [line[name] for line in log if name in line]:
                rows.append(f"| {title} | {values[0]:.4g} | {values[-1]:.4g} |")
        parts.append("\n".join(rows))
    if "memory" in content:
        remembered = f" and with up to {content['memory']} remembered ones" if content["memory"] else ""
        parts.append(f"MKNN in training compares a sample with those of its batch{remembered}.")
    if selection := content.get("selection"):
        keys, scores = selection["keys"], (f"{name} {score:.4f}" for name, score in selection["mknn"].items())
        parts.append(
            f"Selection before training ({keys['hera_select']}, mode {keys['hera_select_mode']}, k="
            f"{keys['hera_select_k']}, {selection['samples']} samples of {selection['dataset']}) measured MKNN "
            f"{', '.join(scores)}; unrelated features reach {selection['chance_level']:.4f}. "
            "`llamafactory-hera score` measures this model."
        )
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts.append(f"Versions: {versions}. `{RUN_FOLDER}/{CARD}` contains the same values and all log lines.")
    parts.append(f"Method: Head-Wise Representation Alignment (HeRA), [arXiv 2606.23885]({_PAPER}).")
    return "\n\n".join([*parts, f"```bibtex\n{_CITATION}\n```"])
