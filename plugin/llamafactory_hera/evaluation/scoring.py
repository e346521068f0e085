"""What each task asks, and how an answer is judged.

Prompts and rules are those of Cambrian-1's evaluation code (github.com/cambrian-mllm/cambrian, ``eval/eval``), which
the paper names (app. B), with its oddities, as these move scores: an option's letter behind "answer is:" is not found,
an answer to MathVista's choices has to be the bare letter. The four hallucination suites follow their authors.
"""

import functools
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json

Row = Mapping[str, Any]

PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
#: Categories of BLINK that the suite asks.
BLINK = ("Counting", "IQ_Test", "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Spatial_Relation")
# The paper's numbers were made with the labels as first published; lmms-eval's copy has two pairs corrected.
_MMVP_LABELS = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}


def _results(judge: Callable[[Row, str], Any]) -> Callable[[Row, Sequence[str]], dict[str, dict[str, Any]]]:
    """What lmms-eval calls, of a function that judges one answer: right or wrong, or a whole record."""

    @functools.wraps(judge)
    def results(row: Row, answers: Sequence[str]) -> dict[str, dict[str, Any]]:
        verdict = judge(row, answers[0].strip())
        return {"hera": verdict if isinstance(verdict, dict) else {"right": int(verdict)}}

    return results


def image(row: Row) -> list[Any]:
    """The first image of a row, which is all that the suite shows."""
    found = next(row[name] for name in ("decoded_image", "image_1", "image") if name in row)
    return [(found[0] if isinstance(found, list) else found).convert("RGB")]


# --- reading answers ---


def _last(answer: str) -> str:
    """What follows the last "answer is" or "answer:", in lower case."""
    return re.split("answer is|answer:", answer.lower())[-1].strip()


def _letter(answer: str) -> str:
    return _last(answer).lstrip("(")[:1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _same(answer: str, target: str) -> bool:
    """Equal, or numbers within 5 % of the target."""
    given, wanted = _number(answer), _number(target)
    if given is None or wanted is None:
        return answer == target
    return answer == target or abs(given - wanted) <= 0.05 * abs(wanted)


def _options(question: str, options: Sequence[str], instruction: str) -> str:
    listed = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, *listed, instruction])


# --- the demo ---


@_results
def demo(row: Row, answer: str) -> dict[str, Any]:
    """Exact match but for case and a full stop; the questions of an image are a group."""
    right = int(answer.rstrip(".").lower() == row["answer"].lower())
    return {"id": row["id"], "group": row["source"], "category": row["category"], "right": right}


# --- General ---


def gqa_rows(rows: Any) -> Any:
    """Questions with their images, which the hub keeps apart from them."""
    if "image" in rows.column_names:
        return rows
    from lmms_eval.tasks.gqa.utils import gqa_process_docs

    return gqa_process_docs(rows)


@_results
def gqa(row: Row, answer: str) -> dict[str, Any]:
    """Exact match; the questions of an image are a group."""
    return {"group": row.get("imageId"), "right": int(answer.lower().rstrip(".") == row["answer"].lower())}


@_results
def pope(row: Row, answer: str) -> dict[str, Any]:
    """The first word; the questions of an image are a group."""
    first = (answer.lower().split() or [""])[0].rstrip(".:,")
    return {"group": row.get("image_source"), "right": int(first == row["answer"].lower())}


@_results
def mme(row: Row, answer: str) -> dict[str, Any]:
    """Exact match; the two questions of an image are a group."""
    right = int(answer.lower().rstrip(".") == row["answer"].lower())
    return {"group": f"{row['category']}/{row['question_id']}", "category": row["category"], "right": right}


def mmbench_prompt(row: Row) -> str:
    """Hint, question, those of four options that there are."""
    given = {name: row[name] for name in ("hint", "A", "B", "C", "D") if row.get(name) not in (None, "nan")}
    hint = f"{given.pop('hint')}\n" if "hint" in given else ""
    options = [f"{letter}. {text}" for letter, text in given.items()]
    return "\n".join([f"{hint}{row['question']} Options:", *options, LETTER])


@_results
def mmbench(row: Row, answer: str) -> dict[str, Any]:
    """The letter; a question and its copies with the options moved on (index + 1,000,000 each) are a group."""
    return {"group": int(row["index"]) % 1_000_000, "right": int(_letter(answer) == row["answer"].lower())}


def seed_rows(rows: Any) -> Any:
    """Leaves the videos out."""
    return rows.filter(lambda kind: kind == "image", input_columns="data_type")


def seed_prompt(row: Row) -> str:
    """Question and four options."""
    return _options(f"{row['question']} Options:", [row[f"choice_{letter}"] for letter in "abcd"], LETTER)


@_results
def seed(row: Row, answer: str) -> bool:
    """The letter."""
    return _letter(answer) == row["answer"].lower()


# --- Knowledge ---


def scienceqa_prompt(row: Row) -> str:
    """Hint, question, options."""
    hint = f"{row['hint']} " if row["hint"] else ""
    return _options(hint + row["question"], row["choices"], ONLY_LETTER)


@_results
def scienceqa(row: Row, answer: str) -> bool:
    """What stands before the first full stop is the letter, or all of it the option's text but for punctuation."""
    bare = str.maketrans("", "", string.punctuation)
    given, text = _last(answer).rstrip("."), row["choices"][row["answer"]].lower()
    letter = string.ascii_lowercase[row["answer"]]
    return given.split(".")[0] == letter or given.translate(bare).strip() == text.translate(bare).strip()


def mmmu_prompt(row: Row) -> str:
    """Question, options, without the marks of images."""
    question = row["question"]
    if row["question_type"] == "multiple-choice":
        text = _options(f"{question} Options:", re.findall(r"'(.*?)'", row["options"]), LETTER)
    else:
        text = f"{question}\n{PHRASE}"
    return re.sub(r"<image \d+>", "", text).rstrip()


@_results
def mmmu(row: Row, answer: str) -> bool:
    """The letter; of an open question the text, or a number within 5 %."""
    choice = row["question_type"] == "multiple-choice"
    return _same(_letter(answer) if choice else _last(answer).rstrip("."), row["answer"].lower())


def mathvista_prompt(row: Row) -> str:
    """The benchmark's own query, and what the suite adds to it."""
    reason = "First show your reasoning process and then give the final answer."
    return f"{row['query']}\n{reason if row['question_type'] == 'multi_choice' else PHRASE}"


@_results
def mathvista(row: Row, answer: str) -> bool:
    """The whole answer is the letter of the option, the text, or a number within 5 %."""
    target = row["answer"]
    if row["question_type"] == "multi_choice":
        target = string.ascii_uppercase[row["choices"].index(target)]
    return _same(answer.lower(), target.lower())


def ai2d_prompt(row: Row) -> str:
    """Question and options."""
    return _options(row["question"], row["options"], LETTER)


@_results
def ai2d(row: Row, answer: str) -> bool:
    """The letter, or the option's number."""
    return _letter(answer) in (str(row["answer"]), string.ascii_lowercase[int(row["answer"])])


# --- OCR ---


@_results
def chartqa(row: Row, answer: str) -> bool:
    """The text, or a number within 5 %."""
    return _same(answer.lower(), row["answer"].lower())


@_results
def ocrbench(row: Row, answer: str) -> bool:
    """One of the targets is found in the answer, in formulas blanks aside."""
    formula = row["question_type"] == "Handwritten Mathematical Expression Recognition"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    targets = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    return any(plain(target) in plain(answer) for target in targets)


def textvqa_prompt(row: Row) -> str:
    """Question and what an OCR system read in the image."""
    tokens = ", ".join(row["ocr_tokens"])
    return f"{row['question']}\n{f'Reference OCR tokens: {tokens}'.strip()}\n{PHRASE}"


@_results
def vqa(row: Row, answer: str) -> dict[str, float]:
    """VQA accuracy: a third for each annotator who agrees, at most 1; the mean over leaving one of them out."""
    from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor

    plain = EvalAIAnswerProcessor()
    wanted = [plain(text.lower()) for text in row["answers"]]
    agree, all_of_them = wanted.count(plain(answer.lower())), len(wanted)
    score = agree * min(1, (agree - 1) / 3) + (all_of_them - agree) * min(1, agree / 3) if agree else 0
    return {"right": score / all_of_them}


# --- Vision ---


def _mmvp(row: Row) -> tuple[int, str, list[str], str]:
    """Index from 1, question, texts of the options and label of a row, whose columns are named in two ways."""
    row = {name.lower(): value for name, value in row.items()}
    index = int(row["index"])
    options = [text.strip() for text in re.split(r"\([a-z]\)", row["options"])[1:]]
    label = _MMVP_LABELS.get(index) or row.get("correct answer") or row["answer"]
    return index, row["question"], options, label.lower()[1]


def mmvp_prompt(row: Row) -> str:
    """Question and two options."""
    _, question, options, _ = _mmvp(row)
    return _options(f"{question} Options:", options, LETTER)


@_results
def mmvp(row: Row, answer: str) -> dict[str, Any]:
    """The letter alone, or the option's text; two images are a group."""
    index, _, options, label = _mmvp(row)
    given = _last(answer).rstrip(".:,").lstrip("(").rstrip(")")
    right = given in (label, options[ord(label) - ord("a")].lower())
    return {"group": (index - 1) // 2, "right": int(right)}


@_results
def realworldqa(row: Row, answer: str) -> bool:
    """The first word."""
    return _last(answer).rstrip(".").split()[:1] == [row["answer"].lower()]


def blink_rows(rows: Any) -> Any:
    """All six categories, of which the hub's definition names one."""
    if len(set(rows["sub_task"])) > 1:
        return rows
    from datasets import concatenate_datasets, load_dataset

    others = [load_dataset("BLINK-Benchmark/BLINK", name, split="val") for name in BLINK[1:]]
    return concatenate_datasets([rows, *others])


@_results
def blink(row: Row, answer: str) -> bool:
    """The first word, before a full stop, without brackets."""
    first = answer.split(".")[0].lower().strip().split(" ")[0]
    return first.lstrip("(").rstrip(")") == row["answer"].lower()[1]


def vstar_prompt(row: Row) -> str:
    """The benchmark's text, which ends with the instruction in one copy and without it in another."""
    return row["text"] if row["text"].rstrip().endswith(LETTER) else f"{row['text'].rstrip()}\n{LETTER}"


@_results
def vstar(row: Row, answer: str) -> bool:
    """The letter."""
    return _letter(answer) == row["label"].lower()


@_results
def cv_bench(row: Row, answer: str) -> dict[str, Any]:
    """The letter; the score weighs the sources of images."""
    return {"category": row["source"], "right": int(_letter(answer) == row["answer"].lower()[1])}


# --- Hallucination ---


@_results
def chair(row: Row, answer: str) -> dict[str, int]:
    """How many objects of COCO are mentioned, and how many of them are not in the image."""
    from lmms_eval.tasks.coco_cap_chair.utils import caption_to_words

    mentioned = caption_to_words(answer)[1]
    return {"mentioned": len(mentioned), "wrong": sum(word not in row["gt_object"] for word in mentioned)}


@_results
def amber_g(row: Row, answer: str) -> dict[str, int]:
    """AMBER's counts of one description; its file of zeros has 0.001 for the denominators, which goes."""
    from lmms_eval.tasks.amber_g.utils import amber_g_process_result

    counts = amber_g_process_result(row, [answer])["amber_chair"]
    kinds = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    return {f"{kind}_{what}": int(counts[f"{kind}_{what}"]) for kind in kinds for what in ("score", "num")}


def amber_d_rows(rows: Any) -> Any:
    """AMBER's questions (``query_discriminative.json``) with its answers, which it keeps in another file."""
    notes = read_json(Path(os.environ["AMBER_BASE_DIR"]) / "metadata/annotations.json")
    truth = {row["id"]: row["truth"] for row in notes}
    return rows.add_column("truth", [truth[number] for number in rows["id"]])


@_results
def amber_d(row: Row, answer: str) -> dict[str, Any]:
    """Yes or no, by how the answer begins; "no" is what is to be found (AMBER, ``inference.py``)."""
    said = next((word for word in ("yes", "no") if re.match(rf"{word}\b", answer.lower())), "")
    return {"truth": row["truth"], "said": said, "right": int(said == row["truth"])}


@_results
def hallusionbench(row: Row, answer: str) -> dict[str, Any]:
    """Yes if the answer says so, otherwise no; a question on all its figures is a group."""
    group = "_".join(str(row[name]) for name in ("category", "subcategory", "set_id", "question_id"))
    right = int(str(int("yes" in answer.lower())) == str(row["gt_answer"]))
    return {"group": group, "category": "hard" if str(row["visual_input"]) == "2" else "easy", "right": right}


# --- the table ---


@dataclass(frozen=True)
class Asked:
    """How a task is asked and judged.

    ``source`` is lmms-eval's definition, which says where the data are; ``rows`` changes them once they are loaded.
    """

    prompt: str | Callable[[Row], str]  # a Jinja template of a row's columns, or a function
    judge: Callable[[Row, Sequence[str]], dict[str, dict[str, Any]]]
    tokens: int  # of an answer, at most
    source: str = ""
    rows: Callable[[Any], Any] | None = None
    data: Mapping[str, str] = field(default_factory=dict)  # where there is no source


TASKS = {
    "demo_questions": Asked("{{question}}", demo, 32, data={"dataset_path": "json", "test_split": "test"}),
    "gqa": Asked("{{question}}\n" + PHRASE, gqa, 128, "gqa/gqa.yaml", gqa_rows),
    "pope": Asked("{{question}}\n" + PHRASE, pope, 128, "pope/pope.yaml"),
    "mme": Asked("{{question}}\n" + PHRASE, mme, 32, "mme/mme.yaml"),
    "mmbench": Asked(mmbench_prompt, mmbench, 512, "mmbench/mmbench_en_dev_static.yaml"),
    "seed": Asked(seed_prompt, seed, 512, "seedbench/seedbench.yaml", seed_rows),
    "scienceqa": Asked(scienceqa_prompt, scienceqa, 512, "scienceqa/scienceqa_img.yaml"),
    "mmmu": Asked(mmmu_prompt, mmmu, 512, "mmmu/mmmu_val.yaml"),
    "mathvista": Asked(mathvista_prompt, mathvista, 512, "mathvista/mathvista_testmini_format.yaml"),
    "ai2d": Asked(ai2d_prompt, ai2d, 512, "ai2d/ai2d.yaml"),
    "chartqa": Asked(
        "{{question}}\nAnswer the question using a single number or phrase.", chartqa, 128, "chartqa/chartqa.yaml"
    ),
    "ocrbench": Asked("{{question}}\nGive the short answer directly.", ocrbench, 512, "ocrbench/ocrbench.yaml"),
    "textvqa": Asked(textvqa_prompt, vqa, 512, "textvqa/textvqa_val.yaml"),
    "vizwiz": Asked(
        "{{question}}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n" + PHRASE,
        vqa,
        128,
        "vizwiz_vqa/vizwiz_vqa_val.yaml",
    ),
    "mmvp": Asked(mmvp_prompt, mmvp, 512, "mmvp/mmvp.yaml"),
    "realworldqa": Asked("{{question}}", realworldqa, 512, "realworldqa/realworldqa.yaml"),
    "blink": Asked("{{prompt}}\n" + ONLY_LETTER, blink, 32, "blink/blink_counting.yaml", blink_rows),
    "vstar": Asked(vstar_prompt, vstar, 32, "vstar_bench/vstar_bench.yaml"),
    "cv_bench": Asked("{{prompt}}\n" + LETTER, cv_bench, 512, "cv_bench/cv_bench.yaml"),
    "chair": Asked("Please describe this image in detail.", chair, 512, "coco_cap_chair/coco_cap_chair.yaml"),
    "amber_g": Asked("Describe this image.", amber_g, 512, "amber_g/amber_g.yaml"),
    "amber_d": Asked(
        "{{query}}", amber_d, 128, rows=amber_d_rows, data={"dataset_path": "json", "test_split": "test"}
    ),
    "hallusionbench": Asked(
        "{{question}}\n" + PHRASE, hallusionbench, 128, "hallusion_bench/hallusion_bench_image.yaml"
    ),
}
