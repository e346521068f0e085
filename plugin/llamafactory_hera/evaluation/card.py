"""A run's scores in its model card, as the hub reads them (``model-index``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..files import write_text
from .suites import Task


def write_index(folder: Path, results: Mapping[Task, Mapping[str, Any]]) -> None:
    """Puts a run's headline scores into its ``README.md``, in the place of earlier ones; its text stays as it is.

    Args:
        folder: Of a run, with what a Trainer leaves; a model that was fetched keeps its card as it is.
        results: By task, the contents of ``result.json``, all of them of whole tasks.
    """
    page = folder / "README.md"
    if not page.is_file() or not (folder / "trainer_state.json").is_file() or not results:
        return
    card = ModelCard.load(page, ignore_metadata_errors=True)
    held = {each.dataset_type: each for each in card.data.eval_results or []}
    for task, result in results.items():
        metric, value = next(iter(result["scores"].items()))
        asked = ("image-text-to-text", task.name, task.title)
        held[task.name] = EvalResult(*asked, metric_type=metric, metric_value=round(value, 2))
    card.data.eval_results = list(held.values())
    card.data.model_name = card.data.model_name or folder.name
    write_text(page, str(card))
