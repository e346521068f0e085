"""Build the demo folder: data, language model, LLaVA and teacher, offline and reproducibly."""

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from . import teacher as teachers
from . import vision
from .dataset import Amounts, Sample, make_samples, write_dataset, write_json
from .language import MAX_LENGTH, new_language_model, pretrain_language_model
from .photos import require_packages
from .scenes import World
from .tokenizer import END_OF_TEXT, train_tokenizer
from .training import THREADS, reproducible

PROVENANCE = "demo.json"
GENERATOR = 1  # raise it when the same request builds something else than before


@dataclass(frozen=True)
class Size:
    """How much data is made, and how many updates each model gets."""

    train: Amounts
    held_out: Amounts
    language_steps: int
    vision_steps: int
    teacher_steps: int


SIZES = {
    "demo": Size(Amounts(512, 64, 64), Amounts(96, 16, 16), language_steps=300, vision_steps=200, teacher_steps=250),
    "test": Size(Amounts(72, 12, 12), Amounts(24, 4, 4), language_steps=30, vision_steps=20, teacher_steps=30),
}


def build_demo(
    output_dir: str | Path = "hera_demo",
    seed: int = 0,
    size: Literal["demo", "test"] = "demo",
    force: bool = False,
) -> dict[str, Path]:
    """Build a tiny LLaVA, its language model, a teacher and a dataset; nothing is downloaded.

    The same seed gives the same files on one machine with one set of library versions. Everything is built in a hidden
    folder beside ``output_dir`` and renamed when it is complete. A folder that was built by the same request is
    returned as it is.

    Args:
        output_dir: The folder to make.
        seed: Seed of the data and of all weights.
        size: ``demo`` (640 training images) or ``test`` (96 training images, hardly trained, for tests).
        force: Replace a demo folder that is already there.

    Returns:
        Paths by name: ``root``, ``model`` (LLaVA with its processor), ``language_model``, ``teacher``, ``data`` (the
        host's ``dataset_dir``).

    Raises:
        ValueError: If ``size`` is unknown; if ``output_dir`` exists and was not built by this function; or if it was
            built by another request and ``force`` is not set.
        ImportError: If scikit-learn or scikit-image is missing; names the extra to install.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: choose one of {', '.join(SIZES)}")
    root = Path(output_dir).absolute()
    request = {"generator": GENERATOR, "seed": seed, "size": size}
    if _is_finished(root, request, force):
        print(f"[hera demo] {output_dir} is there already (seed {seed}, size {size})", flush=True)
        return _paths(root)
    require_packages()
    root.parent.mkdir(parents=True, exist_ok=True)
    work = root.parent / f".{root.name}.{os.getpid()}.tmp"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with reproducible(seed):
            _build(work, request, SIZES[size])
        # Another process may have finished the same folder meanwhile.
        if not _is_finished(root, request, force):
            _move_into_place(work, root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _paths(root)


def _move_into_place(work: Path, root: Path) -> None:
    if not root.exists():
        work.rename(root)
        return
    old = work.with_suffix(".old")
    root.rename(old)
    work.rename(root)
    shutil.rmtree(old)


def _paths(root: Path) -> dict[str, Path]:
    return {"root": root} | {name: root / name for name in ("model", "language_model", "teacher", "data")}


def _is_finished(root: Path, request: dict[str, Any], force: bool) -> bool:
    """Whether the folder is what was asked for; raises if it must not be touched."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / PROVENANCE).read_text(encoding="utf-8"))["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"output_dir={str(root)!r} exists and was not built by the demo (no readable {PROVENANCE}): "
            "choose another output_dir, or remove it yourself"
        ) from error
    if force:
        return False
    if found != request:
        raise ValueError(
            f"output_dir={str(root)!r} holds another demo ({found}, asked for {request}): "
            "choose another output_dir, or pass force=True to replace it"
        )
    return True


def _build(work: Path, request: dict[str, Any], size: Size) -> None:
    seed = request["seed"]
    paths = _paths(work)
    measured: dict[str, Any] = {}
    with _phase("data") as note:
        samples = make_samples(World(), size.train, size.held_out, seed)
        rows = write_dataset(paths["data"], samples, seed)
        note(", ".join(f"{len(content)} {name}" for name, content in rows.items()))
    with _phase("tokenizer") as note:
        documents, plain = _documents(rows)
        tokenizer = train_tokenizer(plain, max_length=MAX_LENGTH)
        note(f"{len(tokenizer)} tokens")
    with _phase("language model, text alone") as note:
        language_model = new_language_model(tokenizer)
        chats = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in documents]
        chats += [sample.caption + END_OF_TEXT for sample in samples["train"]]
        losses = pretrain_language_model(language_model, tokenizer, chats, size.language_steps)
        note(_told(measured.setdefault("language_model", _summary(losses))))
        language_model.save_pretrained(paths["language_model"])
        tokenizer.save_pretrained(paths["language_model"])
    with _phase("vision tower, images alone") as note:
        tower = vision.new_vision_tower()
        losses = vision.pretrain_vision_tower(
            tower, _pixels(vision.image_processor(), samples["train"]), size.vision_steps
        )
        note(_told(measured.setdefault("vision_tower", _summary(losses))))
        vision.assemble_llava(language_model, tower, tokenizer).save_pretrained(paths["model"])
        vision.new_processor(tokenizer).save_pretrained(paths["model"])
    with _phase("teacher, images alone") as note:
        teacher, processor = teachers.new_teacher(), teachers.image_processor()
        losses = teachers.train_teacher(teacher, _pixels(processor, samples["train"]), size.teacher_steps)
        note(_told(measured.setdefault("teacher", _summary(losses))))
        teacher.save_pretrained(paths["teacher"])
        processor.save_pretrained(paths["teacher"])
    libraries = ("torch", "transformers", "tokenizers", "pillow", "scikit-learn", "scikit-image")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    versions["llamafactory-hera"] = __version__
    provenance = {"request": request, "threads": THREADS, "versions": versions, "losses": measured}
    write_json(work / PROVENANCE, provenance)


def _documents(rows: dict[str, list[dict[str, Any]]]) -> tuple[list[list[dict[str, str]]], list[str]]:
    """The training conversations without their images, and the same text without chat tokens."""
    documents = [
        [message | {"content": message["content"].replace("<image>", "").lstrip("\n")} for message in row["messages"]]
        for name in ("hera_demo", "hera_demo_captions", "hera_demo_text")
        for row in rows[name]
    ]
    # The roles are trained in too, so that a turn's head costs few tokens.
    plain = [text for messages in documents for m in messages for text in (m["role"], "\n" + m["content"])]
    return documents, plain


def _pixels(processor: Any, samples: list[Sample]) -> torch.Tensor:
    return processor([sample.image for sample in samples], return_tensors="pt")["pixel_values"]


def _told(summary: dict[str, float]) -> str:
    return "{steps} steps, loss {first_loss:.2f} -> {last_loss:.2f}".format(**summary)


def _summary(losses: list[float]) -> dict[str, float]:
    tail = losses[-max(1, len(losses) // 10) :]
    return {"steps": len(losses), "first_loss": round(losses[0], 4), "last_loss": round(sum(tail) / len(tail), 4)}


@contextmanager
def _phase(name: str) -> Iterator[Any]:
    """Print what a phase noted and the seconds it took."""
    start, notes = time.perf_counter(), []
    yield notes.append
    print(f"[hera demo] {name}: {' '.join(map(str, notes))} ({time.perf_counter() - start:.1f} s)", flush=True)
