"""Prompts of the suites' tasks, and how an answer is judged: right or wrong, or the record that its score is made of.

Both are those of Cambrian-1's evaluation code (github.com/cambrian-mllm/cambrian, ``eval/eval``), which the paper
names (app. B), with its oddities, as these move scores: an option's letter behind "answer is:" is not found, an answer
to MathVista's choices has to be the bare letter. The four hallucination suites follow their authors.
"""

import os
import re
import string
from collections.abc import Mapping, Sequence
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


def image(row: Row) -> list[Any]:
    """The first image of a row, which is all that the suite shows."""
    found = next(row[name] for name in ("decoded_image", "image_1", "image") if name in row)
    return [(found[0] if isinstance(found, list) else found).convert("RGB")]


# --- prompts ---


def options(question: str, texts: Sequence[str], instruction: str = LETTER) -> str:
    """A question with lettered options."""
    listed = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False)]
    return "\n".join([question, *listed, instruction])


def mmbench_prompt(row: Row) -> str:
    """Hint, question, those of four options that there are."""
    given = {name: row[name] for name in ("hint", "A", "B", "C", "D") if row.get(name) not in (None, "nan")}
    hint = f"{given.pop('hint')}\n" if "hint" in given else ""
    return options(f"{hint}{row['question']} Options:", list(given.values()))


def mmmu_prompt(row: Row) -> str:
    """Question, options, without the marks of images."""
    text = f"{row['question']}\n{PHRASE}"
    if row["question_type"] == "multiple-choice":
        text = options(f"{row['question']} Options:", re.findall(r"'(.*?)'", row["options"]))
    return re.sub(r"<image \d+>", "", text).rstrip()


def mathvista_prompt(row: Row) -> str:
    """The benchmark's own query, and what the suite adds to it."""
    reason = "First show your reasoning process and then give the final answer."
    return f"{row['query']}\n{reason if row['question_type'] == 'multi_choice' else PHRASE}"


def textvqa_prompt(row: Row) -> str:
    """Question and what an OCR system read in the image."""
    read = f"Reference OCR tokens: {', '.join(row['ocr_tokens'])}".strip()
    return f"{row['question']}\n{read}\n{PHRASE}"


def mmvp_prompt(row: Row) -> str:
    """Question and two options."""
    row = lower_keys(row)
    return options(f"{row['question']} Options:", _mmvp_options(row))


def vstar_prompt(row: Row) -> str:
    """The benchmark's text, which ends with the instruction in one copy and without it in another."""
    return f"{row['text'].rstrip().removesuffix(LETTER).rstrip()}\n{LETTER}"


# --- rows ---


def lower_keys(row: Row) -> Row:
    """A row of MMVP, whose columns are named in two ways."""
    return {name.lower(): value for name, value in row.items()}


def _mmvp_options(row: Row) -> list[str]:
    return [text.strip() for text in re.split(r"\([a-z]\)", row["options"])[1:]]


def gqa_rows(rows: Any) -> Any:
    """Questions with their images, which the hub keeps apart from them."""
    if "image" in rows.column_names:
        return rows
    from lmms_eval.tasks.gqa.utils import gqa_process_docs

    return gqa_process_docs(rows)


def seed_rows(rows: Any) -> Any:
    """Leaves the videos out."""
    return rows.filter(lambda kind: kind == "image", input_columns="data_type")


def blink_rows(rows: Any) -> Any:
    """All six categories, of which the hub's definition names one."""
    if len(set(rows["sub_task"])) > 1:
        return rows
    from datasets import concatenate_datasets, load_dataset

    others = [load_dataset("BLINK-Benchmark/BLINK", name, split="val") for name in BLINK[1:]]
    return concatenate_datasets([rows, *others])


def amber_d_rows(rows: Any) -> Any:
    """AMBER's questions (``query_discriminative.json``) with its answers, which it keeps in another file."""
    notes = read_json(Path(os.environ["AMBER_BASE_DIR"]) / "metadata/annotations.json")
    truth = {row["id"]: row["truth"] for row in notes}
    return rows.add_column("truth", [truth[number] for number in rows["id"]])


# --- answers ---


def _last(answer: str) -> str:
    """What follows the last "answer is" or "answer:", in lower case."""
    return re.split("answer is|answer:", answer.lower())[-1].strip()


def _letter(answer: str) -> str:
    return _last(answer).lstrip("(")[:1]


def _same(answer: str, target: str) -> bool:
    """Equal, or numbers within 5 % of the target."""
    try:
        return answer == target or abs(float(answer) - float(target)) <= 0.05 * abs(float(target))
    except ValueError:
        return False


def exact(row: Row, answer: str) -> bool:
    """The same but for case and a full stop."""
    return answer.lower().rstrip(".") == row["answer"].lower()


def demo(row: Row, answer: str) -> bool:
    """As `exact`, of a row that a user may have written, maybe with a full stop."""
    for name in ("source", "question", "answer", "category"):
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r}; write a text")
    if row["category"] == "accuracy":
        raise ValueError("category: accuracy is what the score of all questions is called; choose another name")
    return exact({"answer": row["answer"].strip().rstrip(".")}, answer)


def letter(row: Row, answer: str) -> bool:
    """The option's letter."""
    return _letter(answer) == (row.get("label") or row["answer"]).lower().strip("()")


def pope(row: Row, answer: str) -> bool:
    """The first word."""
    return (answer.lower().split() or [""])[0].rstrip(".:,") == row["answer"].lower()


def scienceqa(row: Row, answer: str) -> bool:
    """What stands before the first full stop is the letter, or all of it the option's text but for punctuation."""
    bare = str.maketrans("", "", string.punctuation)
    given, text = _last(answer).rstrip("."), row["choices"][row["answer"]].lower()
    option = string.ascii_lowercase[row["answer"]]
    return given.split(".")[0] == option or given.translate(bare).strip() == text.translate(bare).strip()


def mmmu(row: Row, answer: str) -> bool:
    """The letter; of an open question the text, or a number within 5 %."""
    choice = row["question_type"] == "multiple-choice"
    return _same(_letter(answer) if choice else _last(answer).rstrip("."), row["answer"].lower())


def mathvista(row: Row, answer: str) -> bool:
    """The whole answer is the letter of the option, the text, or a number within 5 %."""
    target = row["answer"]
    if row["question_type"] == "multi_choice":
        target = string.ascii_uppercase[row["choices"].index(target)]
    return _same(answer.lower(), target.lower())


def ai2d(row: Row, answer: str) -> bool:
    """The letter, or the option's number."""
    return _letter(answer) in (str(row["answer"]), string.ascii_lowercase[int(row["answer"])])


def chartqa(row: Row, answer: str) -> bool:
    """The text, or a number within 5 %."""
    return _same(answer.lower(), row["answer"].lower())


def ocrbench(row: Row, answer: str) -> bool:
    """One of the targets is found in the answer, in formulas blanks aside."""
    formula = row["question_type"] == "Handwritten Mathematical Expression Recognition"

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    targets = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    return any(plain(target) in plain(answer) for target in targets)


def vqa(row: Row, answer: str) -> float:
    """VQA accuracy: a third for each annotator who agrees, at most 1; the mean over leaving one of them out."""
    from lmms_eval.tasks.textvqa.utils import EvalAIAnswerProcessor

    plain = EvalAIAnswerProcessor()
    wanted = [plain(text.lower()) for text in row["answers"]]
    agree, all_of_them = wanted.count(plain(answer.lower())), len(wanted)
    score = agree * min(1, (agree - 1) / 3) + (all_of_them - agree) * min(1, agree / 3) if agree else 0
    return score / all_of_them


def mmvp(row: Row, answer: str) -> bool:
    """The letter alone, or the option's text."""
    row = lower_keys(row)
    label = (_MMVP_LABELS.get(int(row["index"])) or row.get("correct answer") or row["answer"]).lower()[1]
    given = _last(answer).rstrip(".:,").lstrip("(").rstrip(")")
    return given in (label, _mmvp_options(row)[ord(label) - ord("a")].lower())


def realworldqa(row: Row, answer: str) -> bool:
    """The first word."""
    return _last(answer).rstrip(".").split()[:1] == [row["answer"].lower()]


def blink(row: Row, answer: str) -> bool:
    """The first word, before a full stop, without brackets."""
    first = answer.split(".")[0].lower().strip().split(" ")[0]
    return first.lstrip("(").rstrip(")") == row["answer"].lower()[1]


def chair(row: Row, answer: str) -> dict[str, int]:
    """How many objects of COCO are mentioned, and how many of them are not in the image."""
    from lmms_eval.tasks.coco_cap_chair.utils import caption_to_words

    mentioned = caption_to_words(answer)[1]
    wrong = sum(word not in row["gt_object"] for word in mentioned)
    return {"mentioned": len(mentioned), "wrong": wrong, "with_wrong": int(wrong > 0)}


def amber_g(row: Row, answer: str) -> dict[str, int]:
    """AMBER's counts of one description; its file of zeros has 0.001 for the denominators, which goes."""
    from lmms_eval.tasks.amber_g.utils import amber_g_process_result

    counts = amber_g_process_result(row, [answer])["amber_chair"]
    kinds = ("chair", "safe_cover", "hallu_cover", "non_hallu")
    record = {f"{kind}_{what}": int(counts[f"{kind}_{what}"]) for kind in kinds for what in ("score", "num")}
    return record | {"hallu_score": record["non_hallu_num"] - record["non_hallu_score"]}


def amber_d(row: Row, answer: str) -> dict[str, Any]:
    """Yes or no, by how the answer begins; "no" is what is to be found (AMBER, ``inference.py``)."""
    said = next((word for word in ("yes", "no") if re.match(rf"{word}\b", answer.lower())), "")
    no, said_no = int(row["truth"] == "no"), int(said == "no")
    return {"right": int(said == row["truth"]), "no": no, "said_no": said_no, "both_no": no * said_no}


def hallusionbench(row: Row, answer: str) -> bool:
    """Yes if the answer says so, otherwise no."""
    return str(int("yes" in answer.lower())) == str(row["gt_answer"])
