"""Writes the HARC recipes' dataset from the paper's three public datasets; see README.md for the downloads.

    python recipes/harc/prepare.py

The classes, the order and the random draws match the authors' code with its seed 0. The result contains harmful
prompts and harmful answers: keep it out of version control.
"""

import argparse
import csv
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parent / "data"
_CIRCUIT_BREAKERS = "circuit_breakers_train.json"
_XSTEST = "xstest_v2_completions_gpt4_gpteval.csv"
_EXTRACT, _HELD_OUT, _HARMLESS = 300, 100, 5000  # rows that define the directions, rows to leave out, rows to train on

Row = tuple[str, str, str]  # prompt, response, class


def harmful_rows(folder: Path, draw: random.Random) -> Iterator[Row]:
    """Reads Circuit Breakers: a refusal of each prompt, and a harmful answer if the prompt defines the directions."""
    rows = json.loads((folder / _CIRCUIT_BREAKERS).read_text("utf-8"))
    draw.shuffle(order := [*range(len(rows))])
    for place, row in enumerate(rows[index] for index in order):
        if not _EXTRACT <= place < _EXTRACT + _HELD_OUT:
            yield row["prompt"], row["llama3_output"], "harmful"
        if place < _EXTRACT:
            yield row["prompt"], row["output"], "compliant"


def pseudo_rows(folder: Path, draw: random.Random) -> Iterator[Row]:
    """Reads the XSTest prompts that GPT-4 answered fully; HARC repeats them as often as needed."""
    with (folder / _XSTEST).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["final_label"] == "1_full_compliance"]
    draw.shuffle(rows)
    yield from ((row["prompt"], row["completion"], "pseudo") for row in rows)


def harmless_rows(folder: Path) -> Iterator[Row]:
    """Reads the first turns of UltraChat."""
    from pyarrow.parquet import read_table

    files = sorted(folder.rglob("test_sft-*.parquet"))
    if not files:
        raise FileNotFoundError(2, "no such file", str(folder / "test_sft-*.parquet"))
    chats = [turns for file in files for turns in read_table(file, columns=["messages"])["messages"].to_pylist()]
    random.Random(0).shuffle(chats)
    pairs = (turns[:2] for turns in chats if [turn["role"] for turn in turns[:2]] == ["user", "assistant"])
    for place, (prompt, answer) in enumerate(pairs):
        if place >= _EXTRACT + _HELD_OUT + _HARMLESS:
            return
        if not _EXTRACT <= place < _EXTRACT + _HELD_OUT:
            yield prompt["content"], answer["content"], "harmless"


def main() -> None:
    """Writes ``harc.jsonl``, completely or not at all, and prints the number of rows of each class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DATA, help="folder with the downloads (default: %(default)s)")
    folder = parser.parse_args().folder
    draw = random.Random(0)
    try:
        rows = [*harmful_rows(folder, draw), *harmless_rows(folder), *pseudo_rows(folder, draw)]
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is missing; see README.md next to this script for the download."
        ) from error
    filled = [row for row in rows if row[0].strip() and row[1].strip()]
    path = folder / "harc.jsonl"
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as file:
        for prompt, response, kind in filled:
            file.write(json.dumps({"prompt": prompt, "response": response, "kind": kind}, ensure_ascii=False) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    counts = Counter(kind for *_, kind in filled)
    counts["without a text, skipped"] = len(rows) - len(filled)
    print(f"{path}: " + ", ".join(f"{number} {kind}" for kind, number in counts.items()))


if __name__ == "__main__":
    main()
