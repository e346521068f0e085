"""The suites: which benchmarks there are, what each needs, and how a score is made of its records.

A record is a flat dict for each sample, which :mod:`.scoring` makes of an answer. Samples that depend on one another
(the questions of an image, a question with its options moved) have the same ``group``: a score counts groups where the
benchmark does, and an interval is over groups.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Records = Sequence[Mapping[str, Any]]
#: Sums over records by name, of one group, of all, or of many resamples.
Sums = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One benchmark of a suite.

    ``needs`` names what :func:`~llamafactory_hera.evaluation.run.missing` looks for before it is run: ``token`` (a
    login at the hub), ``data`` (it must lie in ``--data``), ``nltk:PACKAGE``, ``spacy:PACKAGE``, ``env:VARIABLE``.
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


def _task(name: str, title: str, category: str, n: int | None, *needs: str, close: str = "") -> Task:
    return Task(f"hera_{name}", title, category, "close" if close else "same", close, needs, n)


_NLTK = ("nltk:punkt_tab", "nltk:averaged_perceptron_tagger_eng", "nltk:wordnet")
SUITES: dict[str, tuple[Task, ...]] = {
    "demo": (Task("hera_demo_questions", "Held-out questions", "Demo", "no", "not in the paper", ("data",), None),),
    "paper": (
        _task("gqa", "GQA", "General", 12578, "token"),
        _task("pope", "POPE", "General", 9000, "token"),
        _task("mme", "MME", "General", 2374, "token"),
        _task("mmbench", "MMBench", "General", 4329, "token"),
        _task("seed", "SEED", "General", 14233, "token"),
        _task("scienceqa", "ScienceQA", "Knowledge", 2017, "token"),
        _task("mmmu", "MMMU", "Knowledge", 900),
        _task("mathvista", "MathVista", "Knowledge", 1000, "token"),
        _task("ai2d", "AI2D", "Knowledge", 3088, "token"),
        _task("chartqa", "ChartQA", "OCR", 2500, "token"),
        _task("ocrbench", "OCRBench", "OCR", 1000, "token"),
        _task("textvqa", "TextVQA", "OCR", 5000),
        _task("vizwiz", "VizWiz", "OCR", 4319),
        _task("mmvp", "MMVP", "Vision", 300, "token"),
        _task("realworldqa", "RealWorldQA", "Vision", 765, "token"),
        _task("blink", "BLINK", "Vision", 793),
        _task("vstar", "V*", "Vision", 191),
        _task("cv_bench", "CV-Bench", "Vision", 2638),
    ),
    "hallucination": (
        _task("chair", "CHAIR", "Hallucination", 500, "token", *_NLTK, close="which 500 images is not said"),
        _task("amber_g", "AMBER generative", "Hallucination", 1004, "env:AMBER_BASE_DIR", "spacy:en_core_web_lg",
              *_NLTK, close="medium word vectors are taken where they are installed"),
        _task("amber_d", "AMBER discriminative", "Hallucination", 14216, "data", "env:AMBER_BASE_DIR"),
        _task("hallusionbench", "HallusionBench", "Hallucination", 951, "token",
              close="yes or no is read from the answer instead of asking GPT-4; questions with an image only"),
    ),
}  # fmt: skip


def definition(task: Task) -> dict[str, Any]:
    """A task as lmms-eval takes it: the data of its own definition, asked and judged as :mod:`.scoring` says."""
    from lmms_eval import tasks
    from lmms_eval.utils import load_yaml_config

    from . import scoring

    asked = scoring.TASKS[task.data]
    config: dict[str, Any] = dict(asked.data)
    if asked.source:
        # "simple" leaves its functions out, and with them packages that only these import
        whole = load_yaml_config(str(Path(str(tasks.__file__)).parent / asked.source), mode="simple")
        config = {key: whole.get(key) for key in ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")}
    return config | {
        "task": task.name,
        "output_type": "generate_until",
        "process_docs": asked.rows,
        "doc_to_visual": scoring.image,
        "doc_to_text": asked.prompt,
        "doc_to_target": "",
        "process_results": asked.judge,
        # lmms-eval would end an answer at an empty line
        "generation_kwargs": {"max_new_tokens": asked.tokens, "do_sample": False, "until": []},
        "metric_list": [
            {"metric": "hera", "aggregation": lambda records: headline(task.name, records), "higher_is_better": True}
        ],
    }


def aggregate(task: str, records: Records) -> dict[str, float]:
    """The scores of a task in percent (MME: points), the headline one first."""
    total: dict[str, float] = defaultdict(float)
    for sums in tally(task, records).values():
        for name, value in sums.items():
            total[name] += value
    return {name: float(value) for name, value in scores(task, total).items()}


def headline(task: str, records: Records) -> float:
    """The first of the scores."""
    return next(iter(aggregate(task, records).values()))


def tally(task: str, records: Records) -> dict[Any, Sums]:
    """For each group of records, in their order, what :func:`scores` needs; a record without a group is one."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for place, record in enumerate(records):
        group = record.get("group")
        groups.setdefault(("", place) if group is None else group, []).append(record)
    count = _RULES.get(task, _EACH)[0]
    return {group: count(members) for group, members in groups.items()}


def scores(task: str, sums: Sums) -> dict[str, Any]:
    """The scores of a task of sums over groups: numbers, or arrays of them, one for each resample."""
    return _RULES.get(task, _EACH)[1](defaultdict(float, sums))


def _percent(part: Any, whole: Any) -> Any:
    return 100 * part / np.maximum(whole, 1e-9)  # nothing of nothing is 0


def _add(records: Records) -> Sums:
    """Sums of all numbers of the records, and of those that are right by category."""
    sums: dict[str, float] = defaultdict(float)
    for record in records:
        sums["n"] += 1
        for name, value in record.items():
            if name not in ("id", "group") and not isinstance(value, str):
                sums[name] += value
        if "category" in record:
            sums[f"{record['category']}/n"] += 1
            sums[f"{record['category']}/right"] += record["right"]
    return sums


def _accuracy(sums: Sums) -> dict[str, Any]:
    return {"accuracy": _percent(sums["right"], sums["n"])}


def _by_category(sums: Sums) -> dict[str, Any]:
    kinds = sorted(name.removesuffix("/n") for name in sums if name.endswith("/n"))
    return _accuracy(sums) | {kind: _percent(sums[f"{kind}/right"], sums[f"{kind}/n"]) for kind in kinds}


def _whole(records: Records) -> Sums:
    """A group is right where all of it is."""
    return {"right": int(all(record["right"] for record in records)), "n": 1}


def _mme_image(records: Records) -> Sums:
    kind = records[0]["category"]
    both = int(all(record["right"] for record in records))
    return {**_add(records), f"{kind}/images": 1, f"{kind}/both": both}


_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)


def _mme(sums: Sums) -> dict[str, Any]:
    """Points: for each category of perception the accuracy over questions and that over images, where both count."""
    points = [
        _percent(sums[f"{kind}/right"], sums[f"{kind}/n"]) + _percent(sums[f"{kind}/both"], sums[f"{kind}/images"])
        for kind in _PERCEPTION
    ]
    return {"perception": sum(points)}


def _cv_bench(sums: Sums) -> dict[str, Any]:
    """Half for 2D, of which ADE20K and COCO are a half each, and half for 3D."""
    ade, coco, omni = (_percent(sums[f"{kind}/right"], sums[f"{kind}/n"]) for kind in ("ADE20K", "COCO", "Omni3D"))
    return {"accuracy": ((ade + coco) / 2 + omni) / 2}


def _caption(records: Records) -> Sums:
    return {**_add(records), "with_wrong": sum(record["wrong"] > 0 for record in records)}


def _chair(sums: Sums) -> dict[str, Any]:
    return {
        "CHAIRs ↓": _percent(sums["with_wrong"], sums["n"]),
        "CHAIRi ↓": _percent(sums["wrong"], sums["mentioned"]),
    }


def _amber_g(sums: Sums) -> dict[str, Any]:
    return {
        "CHAIR ↓": _percent(sums["chair_score"], sums["chair_num"]),
        "Cover": _percent(sums["safe_cover_score"], sums["safe_cover_num"]),
        "Hal ↓": 100 - _percent(sums["non_hallu_score"], sums["non_hallu_num"]),
        "Cog ↓": _percent(sums["hallu_cover_score"], sums["hallu_cover_num"]),
    }


def _noes(records: Records) -> Sums:
    no = [(record["truth"] == "no", record["said"] == "no") for record in records]
    counts = {"no": sum(truth for truth, _ in no), "said_no": sum(said for _, said in no)}
    return {**_add(records), **counts, "both_no": sum(truth and said for truth, said in no)}


def _amber_d(sums: Sums) -> dict[str, Any]:
    """Of the answer "no": the thing asked for is not in the image."""
    precision, recall = _percent(sums["both_no"], sums["said_no"]), _percent(sums["both_no"], sums["no"])
    f1 = 2 * precision * recall / (precision + recall + 0.01)  # AMBER's 0.0001, in percent
    return {"accuracy": _accuracy(sums)["accuracy"], "precision": precision, "recall": recall, "F1": f1}


def _question(records: Records) -> Sums:
    """A question is right where it is on all its figures, and so is its easy and its hard half."""
    halves = {kind: [record for record in records if record["category"] == kind] for kind in ("easy", "hard")}
    return _whole(records) | {
        f"{kind}/{name}": value for kind, half in halves.items() if half for name, value in _whole(half).items()
    }


def _hallusion(sums: Sums) -> dict[str, Any]:
    halves = {kind: _percent(sums[f"{kind}/right"], sums[f"{kind}/n"]) for kind in ("easy", "hard")}
    return {"qAcc": _percent(sums["right"], sums["n"])} | halves


_Rule = tuple[Callable[[Records], Sums], Callable[[Sums], dict[str, Any]]]
_EACH: _Rule = (_add, _accuracy)
_RULES: dict[str, _Rule] = {
    "hera_demo_questions": (_add, _by_category),
    "hera_mme": (_mme_image, _mme),
    "hera_mmbench": (_whole, _accuracy),
    "hera_mmvp": (_whole, _accuracy),
    "hera_cv_bench": (_add, _cv_bench),
    "hera_chair": (_caption, _chair),
    "hera_amber_g": (_add, _amber_g),
    "hera_amber_d": (_noes, _amber_d),
    "hera_hallusionbench": (_question, _hallusion),
}
