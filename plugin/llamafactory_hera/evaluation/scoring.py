"""The functions that prepare rows, and the judges, which return whether an answer is right, a score, or counts.

They follow Cambrian-1's evaluation code (github.com/cambrian-mllm/cambrian, ``eval/eval``), which the paper names in
appendix B. Its oddities are kept, because they affect scores: it does not find the letter in "answer is: A", and it
accepts only the letter for MathVista's multiple-choice questions. The hallucination suites follow their authors.
"""

import os
import re
import string
from collections.abc import Mapping
from typing import Any

from ..files import read_json

Row = Mapping[str, Any]

PHRASE = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
# The paper's numbers were computed with the labels as first published; lmms-eval's copy corrects two pairs.
_MMVP_LABELS = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}


def image(row: Row) -> list[Any]:
    """Returns the first image of a row, the only one that Cambrian's code shows to the model."""
    found = next(row[name] for name in ("decoded_image", "image_1", "image") if name in row)
    return [(found[0] if isinstance(found, list) else found).convert("RGB")]


def mmmu_prompt(row: Row) -> str:
    """Formats the question and the options, without the markers of images."""
    text = f"{row['question']}\n{PHRASE}"
    if row["question_type"] == "multiple-choice":
        options = zip(string.ascii_uppercase, re.findall(r"'(.*?)'", row["options"]), strict=False)
        text = "\n".join([f"{row['question']} Options:", *map(". ".join, options), LETTER])
    return re.sub(r"<image \d+>", "", text).rstrip()


def gqa_rows(rows: Any) -> Any:
    """Adds the images, which the hub stores as a second dataset."""
    from lmms_eval.tasks.gqa.utils import gqa_process_docs

    return rows if "image" in rows.column_names else gqa_process_docs(rows)


def mmvp_rows(rows: Any) -> Any:
    """Lower-cases the names of the columns, which differ between copies of the data, and splits the options."""
    rows = rows.rename_columns({name: name.lower() for name in rows.column_names})
    texts = [re.split(r"\s*\([a-z]\)\s*", text.strip())[1:] for text in rows["options"]]
    return rows.add_column("texts", texts)


def blink_rows(rows: Any) -> Any:
    """Adds the other categories of Cambrian's code to the first one, "Counting"."""
    if len(set(rows["sub_task"])) > 1:
        return rows
    from datasets import concatenate_datasets, load_dataset

    names = ("IQ_Test", "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Spatial_Relation")
    return concatenate_datasets([rows, *(load_dataset("BLINK-Benchmark/BLINK", name, split="val") for name in names)])


def amber_d_rows(rows: Any) -> Any:
    """Adds the correct answers to AMBER's questions, which are stored in a second file."""
    truth = {row["id"]: row["truth"] for row in read_json(f"{os.environ['AMBER_BASE_DIR']}/metadata/annotations.json")}
    return rows.add_column("truth", [truth[number] for number in rows["id"]])


def last(answer: str) -> str:
    """Returns the text after the last "answer is" or "answer:", in lower case."""
    return re.split("answer is|answer:", answer.lower())[-1].strip()


def same(answer: str, target: str) -> bool:
    """Compares two texts, or two numbers with a tolerance of 5 % of the target."""
    try:
        return answer == target or abs(float(answer) - float(target)) <= 0.05 * abs(float(target))
    except ValueError:
        return False


def exact(row: Row, answer: str) -> bool:
    """Compares the texts without case and final full stops."""
    return answer.lower().rstrip(".") == row["answer"].lower().strip().rstrip(".")


def letter(row: Row, answer: str) -> bool:
    """Compares the letters of options."""
    return last(answer).lstrip("(")[:1] == (row.get("label") or row["answer"]).lower().strip("()")


def scienceqa(row: Row, answer: str) -> bool:
    """Accepts the letter before the first full stop, or the option's text without punctuation."""
    bare = str.maketrans("", "", string.punctuation)
    given, text = last(answer).rstrip("."), row["choices"][row["answer"]].lower()
    option = string.ascii_lowercase[row["answer"]]
    return given.split(".")[0] == option or given.translate(bare).strip() == text.translate(bare).strip()


def mmmu(row: Row, answer: str) -> bool:
    """Compares the letter, or the text or number of an open question."""
    given, choice = last(answer), row["question_type"] == "multiple-choice"
    return same(given.lstrip("(")[:1] if choice else given.rstrip("."), row["answer"].lower())


def mathvista(row: Row, answer: str) -> bool:
    """Compares the entire answer with the option's letter, or with the text or number."""
    target = row["answer"]
    if row["question_type"] == "multi_choice":
        target = string.ascii_uppercase[row["choices"].index(target)]
    return same(answer.lower(), target.lower())


def ocrbench(row: Row, answer: str) -> bool:
    """Looks for one of the targets in the answer; blanks do not count in formulas."""
    targets = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    texts = [text.strip().replace("\n", " ") for text in (answer, *targets)]
    formula = row["question_type"] == "Handwritten Mathematical Expression Recognition"
    given, *wanted = (text.replace(" ", "") if formula else text.lower() for text in texts)
    return any(target in given for target in wanted)


def vqa(row: Row, answer: str) -> float:
    """Computes the VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving out each annotator."""
    from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor

    plain, n = EvalAIAnswerProcessor(), len(row["answers"])
    agree = [plain(text.lower()) for text in row["answers"]].count(plain(answer.lower()))
    return (agree * min(1, (agree - 1) / 3) + (n - agree) * min(1, agree / 3)) / n if agree else 0


def mmvp(row: Row, answer: str) -> bool:
    """Accepts the letter alone, or the option's text."""
    label = (_MMVP_LABELS.get(int(row["index"])) or row.get("correct answer") or row["answer"]).lower()[1]
    given = last(answer).rstrip(".:,").lstrip("(").rstrip(")")
    return given in (label, row["texts"][ord(label) - ord("a")].lower())


def blink(row: Row, answer: str) -> bool:
    """Compares the first word, up to a full stop and without parentheses."""
    first = answer.split(".")[0].lower().strip().split(" ")[0]
    return first.lstrip("(").rstrip(")") == row["answer"].lower()[1]


def chair(row: Row, answer: str) -> dict[str, int]:
    """Counts the COCO objects that a caption mentions, and those that the image does not show (CHAIR)."""
    from lmms_eval.tasks.coco_cap_chair.utils import caption_to_words

    mentioned = caption_to_words(answer)[1]
    wrong = sum(word not in row["gt_object"] for word in mentioned)
    return {"mentioned": len(mentioned), "wrong": wrong, "with_wrong": int(wrong > 0)}


def amber_g(row: Row, answer: str) -> dict[str, int]:
    """Counts the objects of a description as AMBER does."""
    from lmms_eval.tasks.amber_g.utils import amber_g_process_result

    counts = amber_g_process_result(row, [answer])["amber_chair"]
    kinds = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    # int() removes the 0.001 with which AMBER starts its denominators
    record = {f"{kind}_{what}": int(counts[f"{kind}_{what}"]) for kind in kinds for what in ("score", "num")}
    return record | {"hallu_score": record["non_hallu_num"] - record["non_hallu_score"]}


def amber_d(row: Row, answer: str) -> dict[str, int]:
    """Reads yes or no from the start of the answer; "no" is the positive class (AMBER, ``inference.py``)."""
    said = next((word for word in ("yes", "no") if re.match(rf"{word}\b", answer.lower())), "")
    no, said_no = int(row["truth"] == "no"), int(said == "no")
    return {"right": int(said == row["truth"]), "no": no, "said_no": said_no, "both_no": no * said_no}
