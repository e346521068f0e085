"""A run's scores in its model card, as the hub reads them (``model-index``)."""

from collections.abc import Mapping, Sequence
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
    found = []
    for task, result in results.items():
        metric, value = next(iter(result["scores"].items()))
        asked = ("image-text-to-text", task.name, task.title)
        found.append(EvalResult(*asked, metric_type=metric, metric_value=round(value, 2)))
    index(card, folder, found)
    write_text(page, str(card))


def index(card: ModelCard, folder: Path, results: Sequence[EvalResult]) -> None:
    """Puts results into a run's ``model-index``, in the place of earlier ones of the same metric and data."""
    data: Any = card.data  # ModelCardData
    held = {(each.dataset_type, each.metric_type): each for each in [*(data.eval_results or []), *results]}
    data.eval_results, data.model_name = list(held.values()), data.model_name or folder.name
