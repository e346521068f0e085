"""The tasks of the suites in ``suites.yaml``, and the computation of their scores from records.

Samples that depend on each other, such as the questions about an image, share a ``group``. Confidence intervals
resample groups, so every score is a function of sums over groups.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml

from . import scoring
from .scoring import Row, Sums

Records = Sequence[Mapping[str, Any]]


def _sum(records: Records) -> Sums:
    """Sums the records of a group, in total and by category; ``all`` is 1 if every answer is right."""
    sums: Sums = Counter()
    for record in records:
        sums.update({name: value for name, value in record.items() if name not in ("group", "category", "right")})
    for category in {"", *(f"{record['category']}/" for record in records if "category" in record)}:
        members = [record for record in records if category in ("", f"{record.get('category')}/")]
        right = [record.get("right", 0) for record in members]
        counts = {"n": len(right), "right": sum(right), "groups": 1, "all": int(all(right))}
        sums.update({category + name: count for name, count in counts.items()})
    return sums


@dataclass(frozen=True, eq=False)
class Task:
    """One benchmark of a suite."""

    name: str  # local data: <name>/, saved by datasets' save_to_disk, or <name>.json with the rows
    title: str
    category: str
    n: int | None  # samples of the complete task, if known
    prompt: str | Callable[[Row], str]  # a Jinja template over the columns of a row, or a function
    judge: Callable[[Row, str], bool | float | dict[str, Any]]
    score: Callable[[Sums], dict[str, Any]]  # from the sums of all groups; the headline score is first
    tokens: int = 512  # maximum length of an answer
    source: str = ""  # lmms-eval's definition, which contains the dataset's id; default: <name>/<name>.yaml
    needs: Sequence[str] = ("token",)  # token (of the hub), data (local), nltk:PATH, spacy:PACKAGE, env:VARIABLE
    group: str = ""  # a Jinja template; samples with the same text form a group
    kind: str = ""  # a Jinja template; becomes the category of a record
    rows: Callable[[Any], Any] | None = None  # changes the loaded dataset
    comparable: str = "same"  # how comparable the paper's score is: same, close or no; empty without a score
    why: str = ""  # the reason, if `comparable` is close or no

    def record(self, row: Row, answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Judges an answer and returns its record, in the form that lmms-eval expects."""
        verdict = self.judge(row, answers[0].strip())
        record: dict[str, Any] = verdict if isinstance(verdict, dict) else {"right": float(verdict)}
        templates = {"group": self.group, "category": self.kind}
        return {"hera": record | {name: _template(text).render(row) for name, text in templates.items() if text}}

    def tally(self, records: Records) -> dict[Any, Sums]:
        """Computes the sums of each group, in order; a record without a group is its own group."""
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for place, record in enumerate(records):
            groups.setdefault(record.get("group", ("", place)), []).append(record)
        return {group: _sum(members) for group, members in groups.items()}

    def aggregate(self, records: Records) -> dict[str, float]:
        """Computes the scores of all records in percent (MME: points), the headline score first."""
        total = sum(self.tally(records).values(), Counter())
        return {name: float(value) for name, value in self.score(total).items()}

    def find(self, data: Path | None) -> Path | None:
        """Returns the path of the task's data in a folder, or None if the folder does not contain them."""
        places = [] if data is None else [data / self.name, data / f"{self.name}.json"]
        return next((path for path in places if path.exists()), None)

    def definition(self, data: Path | None = None) -> dict[str, Any]:
        """Returns the task's configuration for lmms-eval, with data from a folder or from the hub."""
        from lmms_eval import tasks
        from lmms_eval.utils import load_yaml_config

        config: dict[str, Any] = {"test_split": "test"}
        if "data" not in self.needs:
            source = Path(str(tasks.__file__)).parent / (self.source or f"{self.name}/{self.name}.yaml")
            # mode "simple" skips the functions of the definition, and the packages that they import
            original = load_yaml_config(str(source), mode="simple")
            keys = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
            config = {key: original.get(key) for key in keys}
        rows, local = self.rows, self.find(data)
        if local is not None:
            disk, files = {"load_from_disk": True}, {"data_files": {config["test_split"]: str(local)}}
            path, options = (str(local), disk) if local.is_dir() else ("json", files)
            config |= {"dataset_path": path, "dataset_name": None, "dataset_kwargs": options}
            rows = self.rows if local.is_dir() else partial(_open_images, local.parent, self.rows)
        return config | {
            "task": self.name,
            "output_type": "generate_until",
            "process_docs": rows,
            "doc_to_visual": scoring.image,
            "doc_to_text": self.prompt,
            "doc_to_target": "",
            "process_results": self.record,
            # by default lmms-eval ends an answer at an empty line
            "generation_kwargs": {"max_new_tokens": self.tokens, "do_sample": False, "until": []},
            "metric_list": [{"metric": "hera", "aggregation": len, "higher_is_better": True}],  # a placeholder
        }


def _open_images(folder: Path, process: Callable[[Any], Any] | None, rows: Any) -> Any:
    """Replaces the paths in the ``image`` column, which are relative to a folder, with images."""
    from datasets import Image

    rows = rows.map(lambda row: {"image": str(folder / row["image"])}, keep_in_memory=True)
    return (process or (lambda rows: rows))(rows.cast_column("image", Image()))


@cache
def _template(text: str) -> Any:
    from lmms_eval.utils import env  # renders the prompts, too

    return env.from_string(text)


def _task(fields: dict[str, Any]) -> Task:
    """Creates a task from its entry in ``suites.yaml``, and looks up the functions that the entry names."""
    names = {key: fields[key] for key in ("prompt", "judge", "rows") if key in fields}
    named: dict[str, Any] = {key: getattr(scoring, name, name) for key, name in names.items()}
    score = fields.get("score", {"accuracy": ("right", "n")})
    named["score"] = partial(scoring.ratios, score) if isinstance(score, dict) else getattr(scoring, score)
    return Task(**fields | named)


_ENTRIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_bytes())
SUITES = {suite: tuple(map(_task, entries)) for suite, entries in _ENTRIES.items()}
