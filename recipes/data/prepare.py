"""Turns downloaded annotations into files that the recipes load. Needs Python alone.

    python recipes/data/prepare.py instruct llava_v1_5_mix665k.json
    python recipes/data/prepare.py grand FOLDER_OF_ANNOTATIONS

Both write beside ``dataset_info.json`` and leave out, and count, what has no picture in the ``images`` folder there.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMAGE = "<image>"
#: OCR-VQA's pictures come as .jpg, .png and .gif, and the annotations call all of them .jpg.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")


def find_image(name: str, images: Path) -> str | None:
    """The name under which a picture lies in ``images``; None if it does not."""
    if (images / name).is_file():
        return name
    stem = Path(name).with_suffix("")
    return next((f"{stem}{suffix}" for suffix in SUFFIXES if (images / f"{stem}{suffix}").is_file()), None)


def instruct_rows(source: Path, images: Path, counts: Counter) -> Iterator[dict[str, Any]]:
    """Rows of LLaVA's 665k mixture.

    Ids become text: some are numbers, and a column of both cannot be loaded. The image token stands once, at the head
    of the first turn, where LLaVA puts it too. In text-only rows it would be taken for a picture that is missing.
    """
    for row in json.loads(source.read_text(encoding="utf-8")):
        name = row.get("image")
        turns = [{"from": turn["from"], "value": turn["value"]} for turn in row["conversations"]]
        if name is None:
            for turn in turns:
                turn["value"] = turn["value"].replace(IMAGE, "image")
            counts["text-only rows"] += 1
            yield {"id": str(row["id"]), "conversations": turns}
            continue
        found = find_image(name, images)
        if found is None:
            counts["rows left out, no picture"] += 1
            continue
        for turn in turns:
            turn["value"] = turn["value"].replace(IMAGE, "").strip()
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        counts["rows with a picture"] += 1
        yield {"id": str(row["id"]), "image": found, "conversations": turns}


def grand_rows(source: Path, images: Path, counts: Counter) -> Iterator[dict[str, Any]]:
    """One row for each of GranD's annotation files: the picture and its dense caption."""
    for file in sorted(source.rglob("*.json")):
        name, annotation = next(iter(json.loads(file.read_text(encoding="utf-8")).items()))
        caption = (annotation.get("dense_caption") or {}).get("caption", "").strip()
        found = find_image(name, images)
        if not caption or found is None:
            counts["rows left out, no picture" if caption else "rows left out, no dense caption"] += 1
            continue
        counts["rows with a picture"] += 1
        turns = [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}]
        yield {"id": Path(name).stem, "image": found, "conversations": turns}


DATASETS = {
    "instruct": (instruct_rows, "llava_instruct/llava_v1_5_mix665k.jsonl"),
    "grand": (grand_rows, "grand_captions/captions.jsonl"),
}


def prepare(name: str, source: Path, folder: Path = HERE) -> Counter:
    """Writes the dataset's file into ``folder``; it appears whole or not at all. Returns what was counted."""
    rows, file_name = DATASETS[name]
    target = folder / file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    counts: Counter = Counter()
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows(source, target.parent / "images", counts):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, target)
    print(f"{target}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("source", type=Path, help="the downloaded file, or folder of files")
    parsed = parser.parse_args()
    prepare(parsed.dataset, parsed.source)
