"""The suites: what is asked of a model, what each task needs, and how a score is made of its records.

A task's definition is ``suites/<name>.yaml``. Its ``process_results`` returns ``{"hera": record}``, a flat dict for each
sample with what :func:`aggregate` needs and, where samples depend on one another, their ``group``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

#: The definitions, one ``<name>.yaml`` each.
FOLDER = Path(__file__).parent / "suites"
Records = Sequence[Mapping]


@dataclass(frozen=True)
class Task:
    """One benchmark of a suite.

    ``needs`` names what :func:`~llamafactory_hera.evaluation.run.missing` looks for before it is run: ``token`` (a login
    at the hub), ``data`` (it must lie in ``--data``), ``nltk:PACKAGE``, ``spacy:PACKAGE``, ``env:VARIABLE``.
    """

    name: str  # ours, for instance hera_pope
    title: str  # the paper's
    category: str  # General, Knowledge, OCR, Vision, Hallucination or Demo
    comparable: str  # with the paper: same, close or no
    why: str  # it is not the same, in a phrase
    needs: tuple[str, ...]
    n: int | None  # samples of the whole task, where known

    @property
    def data(self) -> str:
        """What its data are called in ``--data``: a folder of ``save_to_disk``, or a file of rows with ``.json``."""
        return self.name.removeprefix("hera_")


SUITES: dict[str, tuple[Task, ...]] = {
    "demo": (Task("hera_demo_questions", "Held-out questions", "Demo", "no", "not in the paper", ("data",), None),),
}


def definition(task: Task) -> dict[str, Any]:
    """A task's definition as lmms-eval takes it; ``<lmms_eval>`` in it is where that is installed."""
    import lmms_eval
    from lmms_eval.utils import load_yaml_config

    text = (FOLDER / f"{task.name}.yaml").read_text(encoding="utf-8")
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"{task.name}.yaml"
        path.write_text(text.replace("<lmms_eval>", str(Path(lmms_eval.__file__).parent)), encoding="utf-8")
        return load_yaml_config(str(path))


def aggregate(task: str, records: Records) -> dict[str, float]:
    """The scores of a task in percent (MME: points), the headline one first."""
    return _SCORES[task](records)


def mean(records: Records, key: str = "right") -> float:
    """The mean of one value of the records, in percent."""
    return 100 * sum(record[key] for record in records) / len(records)


def _demo(records: Records) -> dict[str, float]:
    kinds = sorted({record["category"] for record in records})
    each = {kind: mean([record for record in records if record["category"] == kind]) for kind in kinds}
    return {"accuracy": mean(records)} | each


_SCORES: dict[str, Callable[[Records], dict[str, float]]] = {"hera_demo_questions": _demo}
