"""The suites of benchmarks: their data, prompts and judges, and how scores are computed from records.

The record of a sample is a flat dict. Samples that depend on each other, such as the questions about an image, share a
``group``. Confidence intervals resample groups, so every score is a function of sums over groups.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import scoring as by
from .scoring import LETTER, PHRASE, Row

#: Sums by name: numbers, or arrays with one number for each resample.
Sums = Counter[str]
Records = Sequence[Mapping[str, Any]]


def _sum(records: Records) -> Sums:
    """Sums the numbers of a group's records.

    It also counts samples (``n``), right ones, groups and groups with only right samples (``all``); if records have a
    category, all of this by category, as in ``color/right``.
    """
    sums: Sums = Counter()
    for record in records:
        sums.update({name: value for name, value in record.items() if name not in ("group", "category", "right")})
    for category in {"", *(f"{record['category']}/" for record in records if "category" in record)}:
        right = [one.get("right", 0) for one in records if category in ("", f"{one.get('category')}/")]
        counts = {"n": len(right), "right": sum(right), "groups": 1, "all": int(all(right))}
        sums.update({category + name: count for name, count in counts.items()})
    return sums


def _ratio(sums: Sums, part: str, total: str) -> Any:
    """Returns a percentage; 0 of 0 is 0."""
    return 100 * sums[part] / np.maximum(sums[total], 1e-9)


def _ratios(**parts: tuple[str, str]) -> Callable[[Sums], dict[str, Any]]:
    return lambda sums: {name: _ratio(sums, *names) for name, names in parts.items()}


_accuracy = _ratios(accuracy=("right", "n"))
_group_accuracy = _ratios(accuracy=("all", "groups"))


def _by_category(sums: Sums) -> dict[str, Any]:
    categories = sorted(name.removesuffix("/n") for name in sums if name.endswith("/n"))
    return _accuracy(sums) | {name: _ratio(sums, f"{name}/right", f"{name}/n") for name in categories}


def _mme(sums: Sums) -> dict[str, Any]:
    """Adds, over the categories of perception, the accuracies over questions and over images with both right."""
    kinds = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
    both = sum(_ratio(sums, f"{kind}/all", f"{kind}/groups") for kind in kinds)
    return {"perception": sum(_ratio(sums, f"{kind}/right", f"{kind}/n") for kind in kinds) + both}


def _cv_bench(sums: Sums) -> dict[str, Any]:
    """Averages 2D, the mean of ADE20K and COCO, and 3D."""
    ade, coco, omni = (_ratio(sums, f"{kind}/right", f"{kind}/n") for kind in ("ADE20K", "COCO", "Omni3D"))
    return {"accuracy": ((ade + coco) / 2 + omni) / 2}


def _amber_d(sums: Sums) -> dict[str, Any]:
    """Computes precision, recall and F1 of the answer "no"."""
    precision, recall = _ratio(sums, "both_no", "said_no"), _ratio(sums, "both_no", "no")
    f1 = 2 * precision * recall / (precision + recall + 0.01)  # AMBER adds 0.0001 to fractions
    return _accuracy(sums) | {"precision": precision, "recall": recall, "F1": f1}


@dataclass(frozen=True, eq=False)
class Task:
    """One benchmark of a suite."""

    name: str  # also of local data: a folder of datasets' save_to_disk, or with .json a file of rows
    title: str
    category: str
    n: int | None  # samples of the complete task, if known
    prompt: str | Callable[[Row], str]  # a Jinja template over the columns of a row, or a function
    judge: Callable[[Row, str], bool | float | dict[str, Any]]
    tokens: int = 512  # maximum length of an answer
    source: str = ""  # lmms-eval's definition, which names the dataset; default: <name>/<name>.yaml
    needs: tuple[str, ...] = ("token",)  # a login at the hub; or data, nltk:PATH, spacy:PACKAGE, env:FOLDER
    group: str | Callable[[Row], Any] = ""  # a column, or a function of a row
    kind: str | Callable[[Row], str] = ""  # becomes the category of a record
    rows: Callable[[Any], Any] | None = None  # is applied to the loaded dataset
    score: Callable[[Sums], dict[str, Any]] = _accuracy  # from the sums of all groups; the headline score is first
    comparable: str = "same"  # with the paper: same, close, no, or empty if the paper does not report it
    why: str = ""  # the reason if it is not the same

    def record(self, row: Row, answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Judges an answer and returns its record, in the form that lmms-eval expects."""
        verdict = self.judge(row, answers[0].strip())
        record: dict[str, Any] = verdict if isinstance(verdict, dict) else {"right": float(verdict)}
        columns = {"group": self.group, "category": self.kind}
        record |= {name: of(row) if callable(of) else row[of] for name, of in columns.items() if of}
        return {"hera": record}

    def tally(self, records: Records) -> dict[Any, Sums]:
        """Computes the sums of each group, in order; a record without a group forms one."""
        groups: dict[Any, list[Mapping[str, Any]]] = {}
        for place, record in enumerate(records):
            groups.setdefault(record.get("group", ("", place)), []).append(record)
        return {group: _sum(members) for group, members in groups.items()}

    def aggregate(self, records: Records) -> dict[str, float]:
        """Computes the scores of all records in percent (MME: points), the headline score first."""
        total = sum(self.tally(records).values(), Counter())
        return {name: float(value) for name, value in self.score(total).items()}

    def find(self, data: Path | None) -> Path | None:
        """Returns the path of the task's data in a folder; None if they are at the hub."""
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
            theirs = load_yaml_config(str(source), mode="simple")
            config = {key: theirs.get(key) for key in ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")}
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
            "doc_to_visual": by.image,
            "doc_to_text": self.prompt,
            "doc_to_target": "",
            "process_results": self.record,
            # by default lmms-eval ends an answer at an empty line
            "generation_kwargs": {"max_new_tokens": self.tokens, "do_sample": False, "until": []},
            "metric_list": [{"metric": "hera", "aggregation": len, "higher_is_better": True}],  # scores come later
        }


def _open_images(folder: Path, process: Callable[[Any], Any] | None, rows: Any) -> Any:
    """Replaces the paths in the column ``image``, which are relative to a folder, by images."""
    from datasets import Image

    rows = rows.map(lambda row: {"image": str(folder / row["image"])}, keep_in_memory=True)
    return (process or (lambda rows: rows))(rows.cast_column("image", Image()))


def _options(question: str, texts: str) -> str:
    """Returns a template of a question and its options, which are a Jinja expression."""
    letter = "{{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[loop.index0]}}"
    return f"{question}\n{{% for text in {texts} %}}{letter}. {{{{text}}}}\n{{% endfor %}}"


_ASK, _QUESTION = "{{question}}\n", "{{question}} Options:"
_HINT = "{% if hint not in (none, 'nan') %}{{hint}}\n{% endif %}"
_ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
_REASON = "First show your reasoning process and then give the final answer."
_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'.\n"
_NLTK = ("nltk:tokenizers/punkt_tab", "nltk:taggers/averaged_perceptron_tagger_eng", "nltk:corpora/wordnet")
_CHAIR = {"CHAIRs ↓": ("with_wrong", "n"), "CHAIRi ↓": ("wrong", "mentioned")}
_AMBER = {"CHAIR ↓": ("chair_score", "chair_num"), "Cover": ("safe_cover_score", "safe_cover_num"),
          "Hal ↓": ("hallu_score", "non_hallu_num"), "Cog ↓": ("hallu_cover_score", "hallu_cover_num")}  # fmt: skip
SUITES: dict[str, tuple[Task, ...]] = {
    "demo": (
        Task("demo_questions", "Held-out questions", "Demo", None, "{{question}}", by.exact, 32, needs=("data",),
             group="source", kind="category", score=_by_category, comparable=""),
    ),
    "paper": (
        Task("gqa", "GQA", "General", 12578, _ASK + PHRASE, by.exact, 128, group="imageId", rows=by.gqa_rows),
        Task("pope", "POPE", "General", 9000, _ASK + PHRASE,  # the first word counts
             lambda row, given: (given.lower().split() or [""])[0].rstrip(".:,") == row["answer"].lower(), 128,
             group="image_source"),
        Task("mme", "MME", "General", 2374, _ASK + PHRASE, by.exact, 32, kind="category", score=_mme,
             group=lambda row: f"{row['category']}/{row['question_id']}"),
        Task("mmbench", "MMBench", "General", 4329,
             _HINT + _options(_QUESTION, "[A, B, C, D] | reject('in', (none, 'nan'))") + LETTER, by.letter,
             source="mmbench/mmbench_en_dev_static.yaml", score=_group_accuracy,
             group=lambda row: int(row["index"]) % 1_000_000),  # a question and its copies with permuted options
        Task("seed", "SEED", "General", 14233,
             _options(_QUESTION, "[choice_a, choice_b, choice_c, choice_d]") + LETTER, by.letter,
             source="seedbench/seedbench.yaml",
             rows=lambda rows: rows.filter(lambda kind: kind == "image", input_columns="data_type")),  # no videos
        Task("scienceqa", "ScienceQA", "Knowledge", 2017,
             _options("{% if hint %}{{hint}} {% endif %}{{question}}", "choices") + _ONLY_LETTER, by.scienceqa,
             source="scienceqa/scienceqa_img.yaml"),
        Task("mmmu", "MMMU", "Knowledge", 900, by.mmmu_prompt, by.mmmu, source="mmmu/mmmu_val.yaml", needs=()),
        Task("mathvista", "MathVista", "Knowledge", 1000,
             f"{{{{query}}}}\n{{{{{_REASON!r} if question_type == 'multi_choice' else {PHRASE!r}}}}}", by.mathvista,
             source="mathvista/mathvista_testmini_format.yaml"),
        Task("ai2d", "AI2D", "Knowledge", 3088, _options("{{question}}", "options") + LETTER,  # a letter or a number
             lambda row, given: by.last(given).lstrip("(")[:1] in (str(row["answer"]), "abcd"[int(row["answer"])])),
        Task("chartqa", "ChartQA", "OCR", 2500, _ASK + "Answer the question using a single number or phrase.",
             lambda row, given: by.same(given.lower(), row["answer"].lower()), 128),
        Task("ocrbench", "OCRBench", "OCR", 1000, _ASK + "Give the short answer directly.", by.ocrbench),
        Task("textvqa", "TextVQA", "OCR", 5000,
             _ASK + "{{('Reference OCR tokens: ' ~ ocr_tokens | join(', ')) | trim}}\n" + PHRASE, by.vqa, needs=(),
             source="textvqa/textvqa_val.yaml"),
        Task("vizwiz", "VizWiz", "OCR", 4319, _ASK + _UNANSWERABLE + PHRASE, by.vqa, 128, needs=(),
             source="vizwiz_vqa/vizwiz_vqa_val.yaml"),
        Task("mmvp", "MMVP", "Vision", 300, _options(_QUESTION, "texts") + LETTER, by.mmvp, score=_group_accuracy,
             group=lambda row: (int(row["index"]) - 1) // 2, rows=by.mmvp_rows),
        Task("realworldqa", "RealWorldQA", "Vision", 765, "{{question}}",  # the first word counts
             lambda row, given: by.last(given).rstrip(".").split()[:1] == [row["answer"].lower()]),
        Task("blink", "BLINK", "Vision", 793, "{{prompt}}\n" + _ONLY_LETTER, by.blink, 32, needs=(),
             source="blink/blink_counting.yaml", rows=by.blink_rows),
        # some copies of V* contain the instruction
        Task("vstar", "V*", "Vision", 191, f"{{{{text.rstrip().removesuffix(\"{LETTER}\").rstrip()}}}}\n{LETTER}",
             by.letter, 32, source="vstar_bench/vstar_bench.yaml", needs=()),
        Task("cv_bench", "CV-Bench", "Vision", 2638, "{{prompt}}\n" + LETTER, by.letter, needs=(), kind="source",
             score=_cv_bench),
    ),
    "hallucination": (
        Task("chair", "CHAIR", "Hallucination", 500, "Please describe this image in detail.", by.chair,
             source="coco_cap_chair/coco_cap_chair.yaml", needs=("token", *_NLTK), score=_ratios(**_CHAIR),
             comparable="close", why="the paper does not say which 500 images"),
        Task("amber_g", "AMBER generative", "Hallucination", 1004, "Describe this image.", by.amber_g,
             needs=("env:AMBER_BASE_DIR", "spacy:en_core_web_lg", *_NLTK), score=_ratios(**_AMBER),
             comparable="close", why="uses spaCy's medium word vectors if they are installed"),
        Task("amber_d", "AMBER discriminative", "Hallucination", 14216, "{{query}}", by.amber_d, 128,
             needs=("data", "env:AMBER_BASE_DIR"), rows=by.amber_d_rows, score=_amber_d),
        Task("hallusionbench", "HallusionBench", "Hallucination", 951, _ASK + PHRASE,
             lambda row, given: str(int("yes" in given.lower())) == str(row["gt_answer"]), 128,
             source="hallusion_bench/hallusion_bench_image.yaml",
             score=_ratios(qAcc=("all", "groups"), easy=("easy/all", "easy/groups"), hard=("hard/all", "hard/groups")),
             group=lambda row: " ".join(f"{row[of]}" for of in ("category", "subcategory", "set_id", "question_id")),
             kind=lambda row: "hard" if str(row["visual_input"]) == "2" else "easy", comparable="close",
             why="reads yes or no from the answer, without GPT-4; only questions with an image"),
    ),
}  # fmt: skip
