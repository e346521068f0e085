"""Turns downloaded annotations into files that the recipes load.

    python recipes/data/prepare.py instruct llava_v1_5_mix665k.json
    python recipes/data/prepare.py grand FOLDER_OF_ANNOTATIONS
    python recipes/data/prepare.py finevision FOLDER_OF_SUBSETS [SUBSET[=ROWS] ...]

All write beside ``dataset_info.json``. The first two need Python alone, and leave out, and count, what has no picture
in the ``images`` folder there. The last one fills that folder from parquet files; it needs pyarrow and pillow, which
the host brings.
"""

import argparse
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMAGE = "<image>"
#: OCR-VQA's pictures come as .jpg, .png and .gif, and the annotations call all of them .jpg.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
#: Rows of FineVision that the paper trains Qwen3-VL-4B on.
FINEVISION_ROWS = 83_000


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


def finevision_rows(source: Path, images: Path, counts: Counter, *asked: str) -> Iterator[dict[str, Any]]:
    """Rows of FineVision's subsets, each a folder of parquet files in ``source``, drawn by a fixed seed.

    ``asked`` are ``SUBSET=ROWS`` or ``SUBSET``; by default all that are there. One without a number gives an even
    share of 83,000 rows: which subsets the paper takes, and how many rows of each, is not known here.
    """
    names = asked or sorted({file.parent.relative_to(source).as_posix() for file in source.rglob("*.parquet")}) or [""]
    for subset, _, number in (name.partition("=") for name in names):
        yield from _finevision_subset(source, images, counts, subset, int(number or FINEVISION_ROWS // len(names)))


def _finevision_subset(source: Path, images: Path, counts: Counter, subset: str, n: int) -> Iterator[dict[str, Any]]:
    from PIL import Image, UnidentifiedImageError
    from pyarrow.parquet import ParquetFile

    files = [ParquetFile(file) for file in sorted((source / subset).glob("*.parquet"))]
    if not files:
        raise SystemExit(f"{source / subset} holds no parquet file; download its subset, or name another one.")
    there = sum(file.metadata.num_rows for file in files)
    drawn = set(random.Random(0).sample(range(there), min(n, there)))
    batches = (batch for file in files for batch in file.iter_batches(64, columns=["images", "texts"]))
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        if number not in drawn:
            continue
        pairs = [(turn["user"], turn["assistant"]) for turn in row["texts"] if turn["user"] and turn["assistant"]]
        stored = [image["bytes"] for image in row["images"] or []]
        try:
            suffixes = [str(Image.open(io.BytesIO(image)).format).lower() for image in stored]
        except (UnidentifiedImageError, OSError):
            suffixes = []
        if not pairs or len(suffixes) < len(stored):
            counts["rows left out, broken picture" if pairs else "rows left out, no turn"] += 1
            continue
        found = [f"{subset}/{number}_{place}.{suffix}" for place, suffix in enumerate(suffixes)]
        for name, image in zip(found, stored, strict=True):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(image)
        said = [text.replace(IMAGE, "" if found else "image").strip() for pair in pairs for text in pair]
        said[0] = f"{IMAGE * len(found)}\n{said[0]}".strip()
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
        counts["rows with a picture" if found else "text-only rows"] += 1
        yield {"id": f"{subset}/{number}", "images": found, "conversations": turns}


DATASETS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], str]] = {
    "instruct": (instruct_rows, "llava_instruct/llava_v1_5_mix665k.jsonl"),
    "grand": (grand_rows, "grand_captions/captions.jsonl"),
    "finevision": (finevision_rows, "finevision/finevision.jsonl"),
}


def prepare(name: str, source: Path, subsets: Sequence[str] = (), folder: Path = HERE) -> Counter:
    """Writes the dataset's file into ``folder``; it appears whole or not at all. Returns what was counted."""
    rows, file_name = DATASETS[name]
    target = folder / file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    counts: Counter = Counter()
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows(source, target.parent / "images", counts, *subsets):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, target)
    print(f"{target}: " + ", ".join(f"{number} {what}" for what, number in counts.items()))
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("source", type=Path, help="the downloaded file, or folder of files")
    parser.add_argument("subset", nargs="*", help="of finevision: NAME=ROWS, or NAME for an even share of 83,000 rows")
    parsed = parser.parse_args()
    if parsed.subset and parsed.dataset != "finevision":
        parser.error(f"{parsed.dataset} has no subsets")
    prepare(parsed.dataset, parsed.source, parsed.subset)
