"""Build the demo folder: data, language model, LLaVA and teacher, offline and reproducibly."""

import importlib.metadata
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from .. import __version__
from ..files import read_json, write_json
from . import models
from .dataset import Amounts, make_samples, write_dataset

PROVENANCE = "demo.json"
GENERATOR = 2  # raise it when the same request builds something else than before
_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "scikit-learn", "scikit-image")


class Size(NamedTuple):
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
    output_dir: str | Path = "hera_demo", seed: int = 0, size: Literal["demo", "test"] = "demo", force: bool = False
) -> dict[str, Path]:
    """Builds a tiny LLaVA, its language model, a teacher and a dataset; nothing is downloaded.

    The same seed gives the same files on one machine with one set of library versions. The folder appears when it is
    complete; one that was built by the same request is returned as it is.

    Args:
        output_dir: The folder to make.
        seed: Of the data and of all weights.
        size: ``demo`` (640 training images) or ``test`` (96 training images, hardly trained).
        force: Replaces a demo that is already there.

    Returns:
        Paths by name: ``root``, ``model`` (the LLaVA), ``language_model``, ``teacher``, ``data`` (``dataset_dir``).

    Raises:
        ValueError: ``size`` is unknown, or ``output_dir`` is not the demo of this request (with ``force``: of any).
        ImportError: scikit-learn or scikit-image is missing; names the extra to install.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r}: choose one of {', '.join(SIZES)}")
    root = Path(output_dir).absolute()
    request = {"generator": GENERATOR, "seed": seed, "size": size}
    if _is_finished(root, request, force):
        print(f"[hera demo] {output_dir} is there already (seed {seed}, size {size})", flush=True)
        return _paths(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
        work = Path(folder) / root.name
        with models.reproducible(seed):
            _build(work, request, SIZES[size])
        # Another process may have finished the same folder meanwhile.
        if not _is_finished(root, request, force):
            if root.exists():
                root.rename(Path(folder) / "replaced")
            work.rename(root)
    return _paths(root)


def _paths(root: Path) -> dict[str, Path]:
    return {"root": root} | {name: root / name for name in ("model", "language_model", "teacher", "data")}


def _is_finished(root: Path, request: dict[str, Any], force: bool) -> bool:
    """Whether the folder is what was asked for; raises if it must not be touched."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = read_json(root / PROVENANCE)["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"output_dir={str(root)!r} exists and was not built by the demo (no readable {PROVENANCE}): "
            "choose another output_dir, or remove it yourself"
        ) from error
    if not force and found != request:
        raise ValueError(
            f"output_dir={str(root)!r} holds another demo ({found}, asked for {request}): "
            "choose another output_dir, or pass force=True to replace it"
        )
    return not force


def _build(work: Path, request: dict[str, Any], size: Size) -> None:
    """Makes everything in a folder where nobody looks before it is complete."""
    paths = _paths(work)
    losses: dict[str, dict[str, float]] = {}
    started = time.perf_counter()

    def done(phase: str, note: str) -> None:
        nonlocal started
        print(f"[hera demo] {phase}: {note} ({time.perf_counter() - started:.1f} s)", flush=True)
        started = time.perf_counter()

    def trained(name: str, phase: str, values: list[float], folder: Path, *saved: Any) -> None:
        for part in saved:
            part.save_pretrained(folder)
        tail = values[-max(1, len(values) // 10) :]
        first, last = round(values[0], 4), round(sum(tail) / len(tail), 4)
        losses[name] = {"steps": len(values), "first_loss": first, "last_loss": last}
        done(phase, f"{len(values)} steps, loss {first:.2f} -> {last:.2f}")

    samples = make_samples(size.train, size.held_out, request["seed"])
    rows = write_dataset(paths["data"], samples, request["seed"])
    images = [sample.image for sample in samples["train"]]
    done("data", ", ".join(f"{len(content)} {name}" for name, content in rows.items()))

    conversations = [
        [turn | {"content": turn["content"].replace("<image>", "").lstrip("\n")} for turn in row["messages"]]
        for name in ("hera_demo", "hera_demo_captions", "hera_demo_text")
        for row in rows[name]
    ]
    # with roles, so that a turn's head costs few tokens
    words = (text for turns in conversations for turn in turns for text in (turn["role"], "\n" + turn["content"]))
    tokenizer = models.train_tokenizer(words)
    done("tokenizer", f"{len(tokenizer)} tokens")

    language_model = models.new_language_model(tokenizer)
    texts = [str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in conversations]
    texts += [sample.caption + models.END_OF_TEXT for sample in samples["train"]]
    values = models.train_language_model(language_model, tokenizer, texts, size.language_steps)
    saved = language_model, tokenizer
    trained("language_model", "language model, text alone", values, paths["language_model"], *saved)

    tower, _, values = models.train_vision_tower(images, size.vision_steps)
    llava = models.assemble_llava(language_model, tower, tokenizer)
    trained("vision_tower", "vision tower, images alone", values, paths["model"], *llava)

    teacher, processor, values = models.train_teacher(images, size.teacher_steps)
    trained("teacher", "teacher, images alone", values, paths["teacher"], teacher, processor)

    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES} | {"llamafactory-hera": __version__}
    record = {"request": request, "threads": models.THREADS, "versions": versions, "losses": losses}
    write_json(work / PROVENANCE, record, indent=1)
