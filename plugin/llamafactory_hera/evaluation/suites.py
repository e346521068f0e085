"""The suites: which benchmarks there are, how each is asked, and how a score is made of its records.

A record is a flat dict for each sample. Samples that depend on one another (the questions of an image, a question
with its options moved) have the same ``group``: a score counts groups where the benchmark does, and an interval is
over groups.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import scoring as by
from .scoring import LETTER, ONLY_LETTER, PHRASE, Row, options

Records = Sequence[Mapping[str, Any]]
#: Sums over records by name, of one group, of all, or of many resamples.
Sums = dict[str, Any]
#: Of a row: the name of its column, or a function.
Of = str | Callable[[Row], Any]


@dataclass(frozen=True)
class Task:
    """One benchmark of a suite, asked and judged as :mod:`.scoring` says.

    ``needs`` names what :func:`~llamafactory_hera.evaluation.run.missing` looks for before it is run: ``token`` (a
    login at the hub), ``data`` (it must lie in ``--data``), ``nltk:PATH``, ``spacy:PACKAGE``, ``env:VARIABLE``.
    """

    data: str  # what its data are called in ``--data``: a folder of ``save_to_disk``, or with .json a file of rows
    title: str  # the paper's
    category: str  # General, Knowledge, OCR, Vision, Hallucination or Demo
    n: int | None  # samples of the whole task, where known
    prompt: Of  # a Jinja template of a row's columns, or a function
    judge: Callable[[Row, str], bool | float | dict[str, Any]]
    tokens: int = 512  # of an answer, at most
    source: str = ""  # lmms-eval's definition, which says where the data are; by default <data>/<data>.yaml
    needs: tuple[str, ...] = ("token",)
    group: Of = ""
    kind: Of = ""  # a record's category
    rows: Callable[[Any], Any] | None = None  # changes the data once they are loaded
    comparable: str = "same"  # with the paper: same, close or no
    why: str = ""  # it is not the same, in a phrase

    @property
    def name(self) -> str:
        """For lmms-eval and in results."""
        return f"hera_{self.data}"

    def record(self, row: Row, answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What lmms-eval is to keep of an answer."""
        verdict = self.judge(row, answers[0].strip())
        record: dict[str, Any] = verdict if isinstance(verdict, dict) else {"right": float(verdict)}
        for name, of in (("group", self.group), ("category", self.kind)):
            if of:
                record[name] = of(row) if callable(of) else row[of]
        return {"hera": record}


_ASK = "{{question}}\n"
_NLTK = ("nltk:tokenizers/punkt_tab", "nltk:taggers/averaged_perceptron_tagger_eng", "nltk:corpora/wordnet")
SUITES: dict[str, tuple[Task, ...]] = {
    "demo": (
        Task("demo_questions", "Held-out questions", "Demo", None, "{{question}}", by.demo, 32, needs=("data",),
             group="source", kind="category", comparable="no", why="not in the paper"),
    ),
    "paper": (
        Task("gqa", "GQA", "General", 12578, _ASK + PHRASE, by.exact, 128, group="imageId", rows=by.gqa_rows),
        Task("pope", "POPE", "General", 9000, _ASK + PHRASE, by.pope, 128, group="image_source"),
        Task("mme", "MME", "General", 2374, _ASK + PHRASE, by.exact, 32, kind="category",
             group=lambda row: f"{row['category']}/{row['question_id']}"),
        Task("mmbench", "MMBench", "General", 4329, by.mmbench_prompt, by.letter,
             source="mmbench/mmbench_en_dev_static.yaml",
             group=lambda row: int(row["index"]) % 1_000_000),  # a question and its copies with the options moved on
        Task("seed", "SEED", "General", 14233,
             lambda row: options(f"{row['question']} Options:", [row[f"choice_{name}"] for name in "abcd"]),
             by.letter, source="seedbench/seedbench.yaml", rows=by.seed_rows),
        Task("scienceqa", "ScienceQA", "Knowledge", 2017,
             lambda row: options(
                 (f"{row['hint']} " if row["hint"] else "") + row["question"], row["choices"], ONLY_LETTER),
             by.scienceqa, source="scienceqa/scienceqa_img.yaml"),
        Task("mmmu", "MMMU", "Knowledge", 900, by.mmmu_prompt, by.mmmu, source="mmmu/mmmu_val.yaml", needs=()),
        Task("mathvista", "MathVista", "Knowledge", 1000, by.mathvista_prompt, by.mathvista,
             source="mathvista/mathvista_testmini_format.yaml"),
        Task("ai2d", "AI2D", "Knowledge", 3088, lambda row: options(row["question"], row["options"]), by.ai2d),
        Task("chartqa", "ChartQA", "OCR", 2500, _ASK + "Answer the question using a single number or phrase.",
             by.chartqa, 128),
        Task("ocrbench", "OCRBench", "OCR", 1000, _ASK + "Give the short answer directly.", by.ocrbench),
        Task("textvqa", "TextVQA", "OCR", 5000, by.textvqa_prompt, by.vqa, needs=(),
             source="textvqa/textvqa_val.yaml"),
        Task("vizwiz", "VizWiz", "OCR", 4319,
             f"{_ASK}When the provided information is insufficient, respond with 'Unanswerable'.\n{PHRASE}",
             by.vqa, 128, source="vizwiz_vqa/vizwiz_vqa_val.yaml", needs=()),
        Task("mmvp", "MMVP", "Vision", 300, by.mmvp_prompt, by.mmvp,
             group=lambda row: (int(by.lower_keys(row)["index"]) - 1) // 2),
        Task("realworldqa", "RealWorldQA", "Vision", 765, "{{question}}", by.realworldqa),
        Task("blink", "BLINK", "Vision", 793, "{{prompt}}\n" + ONLY_LETTER, by.blink, 32,
             source="blink/blink_counting.yaml", needs=(), rows=by.blink_rows),
        Task("vstar", "V*", "Vision", 191, by.vstar_prompt, by.letter, 32,
             source="vstar_bench/vstar_bench.yaml", needs=()),
        Task("cv_bench", "CV-Bench", "Vision", 2638, "{{prompt}}\n" + LETTER, by.letter, needs=(), kind="source"),
    ),
    "hallucination": (
        Task("chair", "CHAIR", "Hallucination", 500, "Please describe this image in detail.", by.chair,
             source="coco_cap_chair/coco_cap_chair.yaml", needs=("token", *_NLTK),
             comparable="close", why="which 500 images is not said"),
        Task("amber_g", "AMBER generative", "Hallucination", 1004, "Describe this image.", by.amber_g,
             needs=("env:AMBER_BASE_DIR", "spacy:en_core_web_lg", *_NLTK),
             comparable="close", why="medium word vectors are taken where they are installed"),
        Task("amber_d", "AMBER discriminative", "Hallucination", 14216, "{{query}}", by.amber_d, 128,
             needs=("data", "env:AMBER_BASE_DIR"), rows=by.amber_d_rows),
        Task("hallusionbench", "HallusionBench", "Hallucination", 951, _ASK + PHRASE, by.hallusionbench, 128,
             source="hallusion_bench/hallusion_bench_image.yaml",
             group=lambda row: " ".join(f"{row[of]}" for of in ("category", "subcategory", "set_id", "question_id")),
             kind=lambda row: "hard" if str(row["visual_input"]) == "2" else "easy", comparable="close",
             why="yes or no is read from the answer instead of asking GPT-4; questions with an image only"),
    ),
}  # fmt: skip


def definition(task: Task) -> dict[str, Any]:
    """A task as lmms-eval takes it, with the data of its own definition."""
    from lmms_eval import tasks
    from lmms_eval.utils import load_yaml_config

    config = {"dataset_path": "json", "test_split": "test"}
    if "data" not in task.needs:
        source = Path(str(tasks.__file__)).parent / (task.source or f"{task.data}/{task.data}.yaml")
        # "simple" leaves its functions out, and with them packages that only these import
        whole = load_yaml_config(str(source), mode="simple")
        config = {key: whole.get(key) for key in ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")}
    score = {"metric": "hera", "aggregation": lambda records: next(iter(aggregate(task.name, records).values()))}
    return config | {
        "task": task.name,
        "output_type": "generate_until",
        "process_docs": task.rows,
        "doc_to_visual": by.image,
        "doc_to_text": task.prompt,
        "doc_to_target": "",
        "process_results": task.record,
        # lmms-eval would end an answer at an empty line
        "generation_kwargs": {"max_new_tokens": task.tokens, "do_sample": False, "until": []},
        "metric_list": [score | {"higher_is_better": True}],
    }


def aggregate(task: str, records: Records) -> dict[str, float]:
    """The scores of a task in percent (MME: points), the headline one first."""
    total: dict[str, float] = defaultdict(float)
    for sums in tally(task, records).values():
        for name, value in sums.items():
            total[name] += value
    return {name: float(value) for name, value in scores(task, total).items()}


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


def _ratios(parts: Mapping[str, tuple[str, str]]) -> Callable[[Sums], dict[str, Any]]:
    return lambda sums: {name: _percent(sums[part], sums[whole]) for name, (part, whole) in parts.items()}


def _right(sums: Sums, kind: str) -> Any:
    return _percent(sums[f"{kind}/right"], sums[f"{kind}/n"])


def _add(records: Records) -> Sums:
    """Sums of all numbers of the records, and of those that are right by category."""
    sums: dict[str, float] = defaultdict(float)
    for record in records:
        sums["n"] += 1
        for name, value in record.items():
            if name != "group" and not isinstance(value, str):
                sums[name] += value
        if "category" in record:
            sums[f"{record['category']}/n"] += 1
            sums[f"{record['category']}/right"] += record["right"]
    return sums


def _whole(records: Records) -> Sums:
    """A group is right where all of it is."""
    return {"right": int(all(record["right"] for record in records)), "n": 1}


def _mme_image(records: Records) -> Sums:
    kind = records[0]["category"]
    return {**_add(records), f"{kind}/images": 1, f"{kind}/both": _whole(records)["right"]}


def _question(records: Records) -> Sums:
    """A question is right where it is on all its figures, and so is its easy and its hard half."""
    halves = {kind: [record for record in records if record["category"] == kind] for kind in ("easy", "hard")}
    return _whole(records) | {
        f"{kind}/{name}": value for kind, half in halves.items() if half for name, value in _whole(half).items()
    }


def _by_category(sums: Sums) -> dict[str, Any]:
    kinds = sorted(name.removesuffix("/n") for name in sums if name.endswith("/n"))
    return _ACCURACY(sums) | {kind: _right(sums, kind) for kind in kinds}


def _mme(sums: Sums) -> dict[str, Any]:
    """Points: for each category of perception the accuracy over questions and that over images, where both count."""
    kinds = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
    both = [_percent(sums[f"{kind}/both"], sums[f"{kind}/images"]) for kind in kinds]
    return {"perception": sum(_right(sums, kind) for kind in kinds) + sum(both)}


def _cv_bench(sums: Sums) -> dict[str, Any]:
    """Half for 2D, of which ADE20K and COCO are a half each, and half for 3D."""
    return {"accuracy": ((_right(sums, "ADE20K") + _right(sums, "COCO")) / 2 + _right(sums, "Omni3D")) / 2}


def _amber_d(sums: Sums) -> dict[str, Any]:
    """Of the answer "no": the thing asked for is not in the image."""
    precision, recall = _percent(sums["both_no"], sums["said_no"]), _percent(sums["both_no"], sums["no"])
    f1 = 2 * precision * recall / (precision + recall + 0.01)  # AMBER's 0.0001, in percent
    return _ACCURACY(sums) | {"precision": precision, "recall": recall, "F1": f1}


_ACCURACY = _ratios({"accuracy": ("right", "n")})
_CHAIR = {"CHAIRs ↓": ("with_wrong", "n"), "CHAIRi ↓": ("wrong", "mentioned")}
_AMBER = {
    "CHAIR ↓": ("chair_score", "chair_num"),
    "Cover": ("safe_cover_score", "safe_cover_num"),
    "Hal ↓": ("hallu_score", "non_hallu_num"),
    "Cog ↓": ("hallu_cover_score", "hallu_cover_num"),
}
_QUESTIONS = {"qAcc": ("right", "n"), "easy": ("easy/right", "easy/n"), "hard": ("hard/right", "hard/n")}
_Rule = tuple[Callable[[Records], Sums], Callable[[Sums], dict[str, Any]]]
_EACH: _Rule = (_add, _ACCURACY)
_RULES: dict[str, _Rule] = {
    "hera_demo_questions": (_add, _by_category),
    "hera_mme": (_mme_image, _mme),
    "hera_mmbench": (_whole, _ACCURACY),
    "hera_mmvp": (_whole, _ACCURACY),
    "hera_cv_bench": (_add, _cv_bench),
    "hera_chair": (_add, _ratios(_CHAIR)),
    "hera_amber_g": (_add, _ratios(_AMBER)),
    "hera_amber_d": (_add, _amber_d),
    "hera_hallusionbench": (_question, _ratios(_QUESTIONS)),
}
