"""Converts downloaded annotations to files that the recipes load.

    python recipes/data/prepare.py instruct llava_v1_5_mix665k.json
    python recipes/data/prepare.py grand FOLDER_OF_ANNOTATIONS
    python recipes/data/prepare.py finevision FOLDER_OF_SUBSETS [SUBSET[=ROWS] ...]

The results are written next to ``dataset_info.json``. The first two commands need only Python. They skip and
count rows whose image is missing from the dataset's ``images`` folder. The last command fills that folder from parquet
files; it needs pyarrow and pillow, which LLaMA-Factory installs.
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
#: OCR-VQA has .jpg, .png and .gif files, but the annotations call all of them .jpg.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif")
#: The number of FineVision rows on which the paper trains Qwen3-VL-4B.
FINEVISION_ROWS = 83_000


def find_image(name: str, images: Path) -> str | None:
    """Returns the name of an image file in ``images``, possibly with another suffix, or None if it is missing."""
    if (images / name).is_file():
        return name
    stem = Path(name).with_suffix("")
    return next((f"{stem}{suffix}" for suffix in SUFFIXES if (images / f"{stem}{suffix}").is_file()), None)


def instruct_rows(source: Path, images: Path, counts: Counter) -> Iterator[dict[str, Any]]:
    """Reads the rows of LLaVA's 665k mixture.

    All ids become text, because `datasets` cannot load numbers and text in one column. The image token moves to the
    start of the first turn, where LLaVA puts it. In text-only rows, the word "image" replaces the token, because
    LLaMA-Factory would look for an image.
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
            counts["rows skipped, no image"] += 1
            continue
        for turn in turns:
            turn["value"] = turn["value"].replace(IMAGE, "").strip()
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        counts["rows with an image"] += 1
        yield {"id": str(row["id"]), "image": found, "conversations": turns}


def grand_rows(source: Path, images: Path, counts: Counter) -> Iterator[dict[str, Any]]:
    """Reads one row from each annotation file of GranD: the image and its dense caption."""
    for file in sorted(source.rglob("*.json")):
        name, annotation = next(iter(json.loads(file.read_text(encoding="utf-8")).items()))
        caption = (annotation.get("dense_caption") or {}).get("caption", "").strip()
        found = find_image(name, images)
        if not caption or found is None:
            counts["rows skipped, no image" if caption else "rows skipped, no dense caption"] += 1
            continue
        counts["rows with an image"] += 1
        turns = [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}]
        yield {"id": Path(name).stem, "image": found, "conversations": turns}


def finevision_rows(source: Path, images: Path, counts: Counter, *subsets: str) -> Iterator[dict[str, Any]]:
    """Draws rows from FineVision's subsets with a fixed seed; each subset is a folder of parquet files in ``source``.

    A subset is given as ``SUBSET=ROWS`` or ``SUBSET``; by default, all subsets in ``source`` are used. A subset
    without a number contributes an even share of 83,000 rows. The paper does not state its subsets and rows.
    """
    every = sorted({file.parent.relative_to(source).as_posix() for file in source.rglob("*.parquet")})
    names = subsets or every or [""]
    for subset, _, number in (name.partition("=") for name in names):
        yield from _finevision_subset(source, images, counts, subset, int(number or FINEVISION_ROWS // len(names)))


def _finevision_subset(source: Path, images: Path, counts: Counter, subset: str, n: int) -> Iterator[dict[str, Any]]:
    from PIL import Image, UnidentifiedImageError
    from pyarrow.parquet import ParquetFile

    files = [ParquetFile(file) for file in sorted((source / subset).glob("*.parquet"))]
    if not files:
        raise SystemExit(f"{source / subset} contains no parquet file; download the subset, or name another subset.")
    total = sum(file.metadata.num_rows for file in files)
    drawn = set(random.Random(0).sample(range(total), min(n, total)))
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
            counts["rows skipped, broken image" if pairs else "rows skipped, no turn"] += 1
            continue
        found = [f"{subset}/{number}_{place}.{suffix}" for place, suffix in enumerate(suffixes)]
        for name, image in zip(found, stored, strict=True):
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(image)
        texts = [text.replace(IMAGE, "" if found else "image").strip() for pair in pairs for text in pair]
        texts[0] = f"{IMAGE * len(found)}\n{texts[0]}".strip()
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
        counts["rows with an image" if found else "text-only rows"] += 1
        yield {"id": f"{subset}/{number}", "images": found, "conversations": turns}


DATASETS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], str]] = {
    "instruct": (instruct_rows, "llava_instruct/llava_v1_5_mix665k.jsonl"),
    "grand": (grand_rows, "grand_captions/captions.jsonl"),
    "finevision": (finevision_rows, "finevision/finevision.jsonl"),
}


def prepare(name: str, source: Path, subsets: Sequence[str] = (), folder: Path = HERE) -> None:
    """Writes the dataset's file into ``folder``, completely or not at all, and prints the counts."""
    rows, file_name = DATASETS[name]
    path = folder / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    counts: Counter = Counter()
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows(source, path.parent / "images", counts, *subsets):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    print(f"{path}: " + ", ".join(f"{number} {kind}" for kind, number in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("source", type=Path, help="the downloaded file or folder")
    parser.add_argument("subset", nargs="*", help="finevision only: NAME=ROWS, or NAME for an even share of 83,000")
    parsed = parser.parse_args()
    if parsed.subset and parsed.dataset != "finevision":
        parser.error(f"{parsed.dataset} has no subsets")
    prepare(parsed.dataset, parsed.source, parsed.subset)
