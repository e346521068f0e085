"""What a finished run says of itself: metadata and a section of the host's model card, and the same facts as JSON."""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import CARD, RUN_FOLDER, read_json, write_json, write_text
from ..heads import Targets
from ..selection.scores import command_line, package_versions
from ..training import Aligner

_PAPER = "https://arxiv.org/abs/2606.23885"
_CITATION = """@article{caffagni2026hera,
  title   = {Mind the Heads: Topological Representation Alignment for Multimodal LLMs},
  author  = {Caffagni, Davide and Compagnoni, Alberto and Melis, Federico and Sarto, Sara and Dovesi, Pier Luigi and
             Granroth-Wilding, Mark and Cornia, Marcella and Baraldi, Lorenzo},
  journal = {arXiv preprint arXiv:2606.23885},
  year    = {2026}
}"""
_BEGIN, _END = "<!-- llamafactory-hera -->", "<!-- /llamafactory-hera -->"
# Measured during training, first and last log line of the run.
_CURVES = {
    "hera_mknn": "MKNN in training batches",
    "hera_mknn_chance": "MKNN of unrelated features",
    "lm_loss": "language-modeling loss",
    "hera_loss": "alignment loss, unweighted",
    "hera_temperature": "temperature",
}


def write_card(
    output_dir: str | os.PathLike,
    aligner: Aligner,
    log_history: list[dict[str, float]],
    steps: int,
    best_step: int | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Adds the section to ``README.md`` in the output folder, instead of an earlier one, and writes the JSON.

    The page's metadata get tags, the hub ids of ``datasets``, and the MKNN before training where a selection measured
    it; a ``base_model`` that is a folder here goes, as the hub would take it for a model of that name or refuse it.

    ``best_step`` is the one whose weights were loaded at the end, as the best.
    """
    facts = _card_facts(aligner, log_history, steps, best_step)
    folder = Path(output_dir)
    (folder / RUN_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FOLDER / CARD, facts)
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "---\n{}\n---\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    before = re.sub(rf"\n*{_BEGIN}.*?{_END}\n*", "\n", card.text, flags=re.DOTALL).strip("\n")
    card.text = "\n\n".join(filter(None, [before, f"{_BEGIN}\n{_render(facts)}\n{_END}\n"]))
    data: Any = card.data  # ModelCardData
    tags = list(data.tags or [])
    tags += ["hera", facts["objective"].rpartition(":")[2], *(["llamafactory"] if "llama-factory" in tags else [])]
    data.tags = list(dict.fromkeys(tags))
    data.datasets = list(dict.fromkeys([*(data.datasets or []), *datasets])) or None
    if isinstance(data.base_model, str) and Path(data.base_model).is_dir():
        data.base_model = None
    selection = facts.get("selection", {})
    if {"mknn", "dataset"} <= selection.keys():
        _update_index(card, folder, [_result(selection, selection["mknn"], "before")])
    write_text(page, str(card))


def index_scores(folder: Path, scores: Path) -> None:
    """Puts the MKNN that was measured on a run's model into its model card; where there is no such card, nothing.

    Args:
        folder: The output folder of the run.
        scores: The file that ``llamafactory-hera score`` wrote.
    """
    page, file = folder / "README.md", folder / RUN_FOLDER / CARD
    if not (page.is_file() and file.is_file()):
        return
    facts, scored = read_json(file), Targets.load(scores).provenance
    aligned = Targets.parse(facts.get("heads") or facts["layers"], "head" if "heads" in facts else "layer")
    known = _scores(Targets(aligned.items, scored))
    if known:
        card = ModelCard.load(page, ignore_metadata_errors=True)
        _update_index(card, folder, [_result(scored, known, "after")])
        write_text(page, str(card))


def _result(facts: dict[str, Any], scores: dict[str, float], when: str) -> EvalResult:
    """The mean of heads' or layers' scores as the hub reads it, with what they were measured on."""
    keys, chance = facts.get("keys", {}), facts.get("chance_level", float("nan"))
    mode = keys.get("hera_select_mode")
    measured = f"mode {mode}, k={keys.get('hera_select_k')}, {facts.get('samples')} samples, chance {chance:.4f}"
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=facts["dataset"],
        dataset_name=facts["dataset"],
        metric_type=f"mknn_{mode}_{when}",
        metric_name=f"MKNN {when} training, mean of {', '.join(scores)} ({measured})",
        metric_value=round(mean(scores.values()), 4),
    )


def _card_facts(
    aligner: Aligner, log_history: list[dict[str, float]], steps: int, best_step: int | None
) -> dict[str, Any]:
    """The facts of a run: what was aligned to what and how, and what was measured; what is not known is left out."""
    config, targets = aligner.config, aligner.targets
    lines = [line for line in log_history if line.get("hera_loss")]  # 0 where no sample could be compared
    logged = {name: [line[name] for line in lines if name in line] for name in _CURVES}
    curves = {name: {"first": values[0], "last": values[-1]} for name, values in logged.items() if values}
    facts: dict[str, Any] = {
        targets.what: list(targets.names),
        "objective": config.objective,
        "weight": config.weight,
        "teacher": config.teacher,
        "teacher_fingerprint": aligner.teacher.encoder.fingerprint,
        "steps": steps,
        "curves": curves,
        "log_lines": len(lines),
        "log": [{name: line[name] for name in ("step", *_CURVES) if name in line} for line in lines],
        "command": command_line(),
        "versions": package_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "paper": _PAPER,
    }
    if best_step not in (None, steps):
        facts["weights_of_step"] = best_step
    if config.reads("hera_memory"):
        facts |= {"k": config.k, "memory": config.memory}
    if targets.provenance:
        names = ["keys", "samples", "chance_level", "dataset", "date"]
        facts["selection"] = {name: targets.provenance[name] for name in names if name in targets.provenance}
        scores = _scores(targets)
        if scores:
            facts["selection"]["mknn"] = scores
    return facts


def _render(facts: dict[str, Any]) -> str:
    """The section as Markdown."""
    kind = "heads" if "heads" in facts else "layers"
    lines = [
        "## Alignment with a vision encoder",
        "",
        f"Trained with llamafactory-hera: the {facts['objective']} "
        f"objective aligned {kind} {', '.join(facts[kind])} with {facts['teacher']}, at weight {facts['weight']} "
        f"beside the language-modeling loss, for {facts['steps']} steps.",
    ]
    if "weights_of_step" in facts:
        lines[-1] += f" The weights are those of step {facts['weights_of_step']}, the best one."
    if facts["curves"]:
        several = {"first": "first logged", "last": "last logged"}
        shown = several if facts["log_lines"] > 1 else {"last": "the only log line"}
        lines += ["", f"| measured in training | {' | '.join(shown.values())} |", "|---|" + "--:|" * len(shown)]
        lines += [
            f"| {_CURVES[name]} | {' | '.join(f'{value[column]:.4g}' for column in shown)} |"
            for name, value in facts["curves"].items()
        ]
    if "memory" in facts and "hera_mknn" in facts["curves"]:
        remembered = f" and up to {facts['memory']} remembered" if facts["memory"] else ""
        among = f"those of its batch{remembered}"
        lines += ["", f"MKNN in training compares a sample with {among}; other candidates give other values."]
    selection = facts.get("selection", {})
    keys = selection.get("keys", {})
    if "mknn" in selection:
        lines += [
            "",
            f"Selected before training ({keys.get('hera_select')}, mode {keys.get('hera_select_mode')}, "
            f"{selection.get('samples')} samples of {selection.get('dataset')}, k={keys.get('hera_select_k')}, chance "
            f"{selection.get('chance_level', float('nan')):.4f}); MKNN then: "
            + ", ".join(f"{name} {score:.4f}" for name, score in selection["mknn"].items())
            + ". `llamafactory-hera score` measures it on this model.",
        ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [
        "",
        f"{versions}. The same facts: `{RUN_FOLDER}/{CARD}`.",
        "",
        f"Method: Head-Wise Representation Alignment (HeRA), [arXiv 2606.23885]({_PAPER}).",
        "",
        "```bibtex",
        _CITATION,
        "```",
    ]
    return "\n".join(lines)


def _scores(targets: Targets) -> dict[str, float]:
    """MKNN at selection of each head or layer, as far as it is known."""
    known = targets.provenance.get("scores" if targets.granularity == "head" else "layer_scores") or []
    found = {}
    for item in targets.items:
        values = known[item.layer : item.layer + 1]
        if item.head is not None and values:
            values = values[0][item.head : item.head + 1]
        if values and values[0] is not None:
            found[str(item)] = values[0]
    return found


def _update_index(card: ModelCard, folder: Path, results: Sequence[EvalResult]) -> None:
    """Adds results to the ``model-index`` of a card; they replace earlier ones of the same metric and dataset."""
    data: Any = card.data
    held = {(each.dataset_type, each.metric_type): each for each in [*(data.eval_results or []), *results]}
    data.eval_results, data.model_name = list(held.values()), data.model_name or folder.name
