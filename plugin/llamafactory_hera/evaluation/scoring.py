"""The functions that ``suites.yaml`` names: they prepare rows, judge answers, and compute scores from sums.

The judges follow Cambrian-1's evaluation code (github.com/cambrian-mllm/cambrian, ``eval/eval``; cited in the paper's
appendix B), oddities included. For instance, they do not find the letter in "answer is: A". The judges of the
hallucination suite follow the code of each benchmark's authors.
"""

import os
import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files import read_json

Row = Mapping[str, Any]
#: Sums by name. A sum is a number, or an array with one number for each resample.
Sums = Counter[str]

# The paper's numbers were computed with the labels published first; lmms-eval's copy corrects two pairs.
_MMVP_LABELS = {99: "(a)", 100: "(b)", 279: "(a)", 280: "(b)"}


def image(row: Row) -> list[Any]:
    """Returns the first image of a row; Cambrian's code shows only this image to the model."""
    images = next(row[name] for name in ("decoded_image", "image_1", "image") if name in row)
    return [(images[0] if isinstance(images, list) else images).convert("RGB")]


def mmmu_prompt(row: Row) -> str:
    """Formats the question and the options, without image markers."""
    text = f"{row['question']}\nAnswer the question using a single word or phrase."
    if row["question_type"] == "multiple-choice":
        options = zip(string.ascii_uppercase, re.findall(r"'(.*?)'", row["options"]), strict=False)
        instruction = "Answer with the option's letter from the given choices directly."
        text = "\n".join([f"{row['question']} Options:", *map(". ".join, options), instruction])
    return re.sub(r"<image \d+>", "", text).rstrip()


def gqa_rows(rows: Any) -> Any:
    """Adds the images, which the hub stores in a second dataset."""
    from lmms_eval.tasks.gqa.utils import gqa_process_docs

    return rows if "image" in rows.column_names else gqa_process_docs(rows)


def seed_rows(rows: Any) -> Any:
    """Leaves out the questions about videos."""
    return rows.filter(lambda kind: kind == "image", input_columns="data_type")


def mmvp_rows(rows: Any) -> Any:
    """Lower-cases the column names, which differ between copies of the data, and splits the options."""
    rows = rows.rename_columns({name: name.lower() for name in rows.column_names})
    texts = [re.split(r"\s*\([a-z]\)\s*", text.strip())[1:] for text in rows["options"]]
    return rows.add_column("texts", texts)


def blink_rows(rows: Any) -> Any:
    """Extends the category "Counting" with the other categories that Cambrian's code uses."""
    if len(set(rows["sub_task"])) > 1:
        return rows
    from datasets import concatenate_datasets, load_dataset

    names = ("IQ_Test", "Object_Localization", "Relative_Depth", "Relative_Reflectance", "Spatial_Relation")
    return concatenate_datasets([rows, *(load_dataset("BLINK-Benchmark/BLINK", name, split="val") for name in names)])


def amber_d_rows(rows: Any) -> Any:
    """Adds the correct answers, which AMBER stores in a second file."""
    truth = {row["id"]: row["truth"] for row in read_json(f"{os.environ['AMBER_BASE_DIR']}/metadata/annotations.json")}
    return rows.add_column("truth", [truth[number] for number in rows["id"]])


def last(answer: str) -> str:
    """Returns the text after the last "answer is" or "answer:", in lower case."""
    return re.split("answer is|answer:", answer.lower())[-1].strip()


def equal(answer: str, target: str) -> bool:
    """Compares two texts, or two numbers with a tolerance of 5% of the target."""
    try:
        return answer == target or abs(float(answer) - float(target)) <= 0.05 * abs(float(target))
    except ValueError:
        return False


def exact(row: Row, answer: str) -> bool:
    """Compares the texts, ignoring case and final full stops."""
    return answer.lower().rstrip(".") == row["answer"].lower().strip().rstrip(".")


def pope(row: Row, answer: str) -> bool:
    """Compares the first word of the answer with the correct answer."""
    return (answer.lower().split() or [""])[0].rstrip(".:,") == row["answer"].lower()


def letter(row: Row, answer: str) -> bool:
    """Compares the first letter of the answer with the letter of the correct option."""
    return last(answer).lstrip("(")[:1] == (row.get("label") or row["answer"]).lower().strip("()")


def scienceqa(row: Row, answer: str) -> bool:
    """Accepts the letter before the first full stop, or the option's text without punctuation."""
    bare = str.maketrans("", "", string.punctuation)
    given, text = last(answer).rstrip("."), row["choices"][row["answer"]].lower()
    option = string.ascii_lowercase[row["answer"]]
    return given.split(".")[0] == option or given.translate(bare).strip() == text.translate(bare).strip()


def mmmu(row: Row, answer: str) -> bool:
    """Compares the option's letter or, for an open question, the text or number."""
    given, choice = last(answer), row["question_type"] == "multiple-choice"
    return equal(given.lstrip("(")[:1] if choice else given.rstrip("."), row["answer"].lower())


def mathvista(row: Row, answer: str) -> bool:
    """Compares the entire answer with the option's letter or, for an open question, with the text or number."""
    target = row["answer"]
    if row.get("question_type") == "multi_choice":
        target = string.ascii_uppercase[row["choices"].index(target)]
    return equal(answer.lower(), target.lower())


def ai2d(row: Row, answer: str) -> bool:
    """Accepts the letter or the number of the option."""
    return last(answer).lstrip("(")[:1] in (str(row["answer"]), "abcd"[int(row["answer"])])


def ocrbench(row: Row, answer: str) -> bool:
    """Looks for one of the correct texts in the answer; in formulas, spaces are ignored."""
    targets = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    texts = [text.strip().replace("\n", " ") for text in (answer, *targets)]
    formula = row["question_type"] == "Handwritten Mathematical Expression Recognition"
    given, *wanted = (text.replace(" ", "") if formula else text.lower() for text in texts)
    return any(target in given for target in wanted)


def vqa(row: Row, answer: str) -> float:
    """Computes the VQA accuracy: min(1, agreeing annotators / 3), averaged over the sets that omit one annotator."""
    from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor

    plain, n = EvalAIAnswerProcessor(), len(row["answers"])
    agree = [plain(text.lower()) for text in row["answers"]].count(plain(answer.lower()))
    return (agree * min(1, (agree - 1) / 3) + (n - agree) * min(1, agree / 3)) / n if agree else 0


def mmvp(row: Row, answer: str) -> bool:
    """Accepts the letter without other text, or the option's text."""
    label = (_MMVP_LABELS.get(int(row["index"])) or row.get("correct answer") or row["answer"]).lower()[1]
    given = last(answer).rstrip(".:,").lstrip("(").rstrip(")")
    return given in (label, row["texts"][ord(label) - ord("a")].lower())


def realworldqa(row: Row, answer: str) -> bool:
    """Compares the first word after "answer is"."""
    return last(answer).rstrip(".").split()[:1] == [row["answer"].lower()]


def blink(row: Row, answer: str) -> bool:
    """Compares the first word, up to a full stop and without parentheses."""
    first = answer.split(".")[0].lower().strip().split(" ")[0]
    return first.lstrip("(").rstrip(")") == row["answer"].lower()[1]


def chair(row: Row, answer: str) -> dict[str, int]:
    """Counts the COCO objects in a caption, and the objects among them that the image does not show (CHAIR)."""
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
    record = {name: int(counts[name]) for kind in kinds for name in (f"{kind}_score", f"{kind}_num")}
    return record | {"hallu_score": record["non_hallu_num"] - record["non_hallu_score"]}


def amber_d(row: Row, answer: str) -> dict[str, int]:
    """Reads yes or no from the start of the answer; "no" is the positive class (AMBER, ``inference.py``)."""
    given = next((word for word in ("yes", "no") if re.match(rf"{word}\b", answer.lower())), "")
    no, said_no = int(row["truth"] == "no"), int(given == "no")
    return {"right": int(given == row["truth"]), "no": no, "said_no": said_no, "both_no": no * said_no}


def hallusionbench(row: Row, answer: str) -> bool:
    """Reads an answer that contains "yes" as yes, and any other answer as no."""
    return str(int("yes" in answer.lower())) == str(row["gt_answer"])


def _ratio(sums: Sums, part: str, total: str) -> Any:
    """Returns a part of a total in percent; 0 if both are 0."""
    return 100 * sums[part] / np.maximum(sums[total], 1e-9)


def ratios(parts: Mapping[str, tuple[str, str]], sums: Sums) -> dict[str, Any]:
    """Computes scores that are ratios of two sums."""
    return {name: _ratio(sums, *names) for name, names in parts.items()}


def by_category(sums: Sums) -> dict[str, Any]:
    """Computes the accuracy, and the accuracy of each category."""
    categories = sorted(name.removesuffix("/n") for name in sums if name.endswith("/n"))
    parts = {"accuracy": ("right", "n")} | {name: (f"{name}/right", f"{name}/n") for name in categories}
    return ratios(parts, sums)


def mme_score(sums: Sums) -> dict[str, Any]:
    """Sums, over the perception categories, the accuracy and the share of images with two right answers."""
    kinds = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
    parts = [(f"{kind}/right", f"{kind}/n") for kind in kinds] + [(f"{kind}/all", f"{kind}/groups") for kind in kinds]
    return {"perception": sum(_ratio(sums, *names) for names in parts)}


def cv_bench_score(sums: Sums) -> dict[str, Any]:
    """Averages the 2D accuracy (the mean of ADE20K and COCO) and the 3D accuracy (Omni3D)."""
    ade, coco, omni = (_ratio(sums, f"{kind}/right", f"{kind}/n") for kind in ("ADE20K", "COCO", "Omni3D"))
    return {"accuracy": ((ade + coco) / 2 + omni) / 2}


def amber_d_score(sums: Sums) -> dict[str, Any]:
    """Computes the accuracy, and precision, recall and F1 of the answer "no"."""
    precision, recall = _ratio(sums, "both_no", "said_no"), _ratio(sums, "both_no", "no")
    f1 = 2 * precision * recall / (precision + recall + 0.01)  # 0.01%; AMBER adds 0.0001 to fractions
    return {"accuracy": _ratio(sums, "right", "n"), "precision": precision, "recall": recall, "F1": f1}
