"""Builds the demo folder offline: the data, the language model, the LLaVA model and the teacher."""

import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from llamafactory_hera.files import read_json, write_json

from . import models
from .dataset import Amounts, make_samples, write_dataset

#: The file that marks a finished demo. It contains the request, the library versions and each model's losses.
RECORD = "demo.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow", "scikit-learn", "scikit-image", "llamafactory-hera")


class Size(NamedTuple):
    """The amounts of data, and the number of training steps of each model."""

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
    output_dir: str | Path = "hera_demo", seed: int = 0, size: str = "demo", force: bool = False
) -> dict[str, Path]:
    """Builds a tiny LLaVA, its language model, a teacher and a dataset, and downloads nothing.

    With the same seed, machine and library versions, the files are identical. The folder appears only when it is
    complete. If the folder already contains the demo of the same seed and size, it is left unchanged.

    Args:
        output_dir: The folder to create.
        seed: The seed of the data and of all weights.
        size: ``demo`` (640 training images) or ``test`` (96 training images, little training).
        force: True to replace an earlier demo.

    Returns:
        Paths by name: ``root``, ``model`` (the LLaVA), ``language_model``, ``teacher`` and ``data`` (the dataset).

    Raises:
        ValueError: The folder contains something other than a demo or, without ``force``, a different demo.
    """
    root, request = Path(output_dir).resolve(), {"seed": seed, "size": size}
    if _is_built(root, request, force):
        print(f"[hera demo] {output_dir} already exists (seed {seed}, size {size})", flush=True)
        return _paths(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as folder:
        work = Path(folder) / root.name
        with models.reproducible(seed):
            _build(work, request, SIZES[size])
        if force and root.exists():
            root.rename(Path(folder) / "replaced")
        work.rename(root)
    return _paths(root)


def _paths(root: Path) -> dict[str, Path]:
    return {"root": root} | {name: root / name for name in ("model", "language_model", "teacher", "data")}


def _is_built(root: Path, request: dict[str, Any], force: bool) -> bool:
    """Returns True if the requested demo can stay; raises ``ValueError`` if the folder must not be replaced."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / RECORD).is_file():
        raise ValueError(f"--output: {root} exists and contains no demo; choose another folder.")
    found = read_json(root / RECORD)["request"]
    if not force and found != request:
        raise ValueError(
            f"--output: {root} contains a different demo ({found}, not {request}); choose another folder, or add "
            "--force to replace it."
        )
    return not force


def _build(work: Path, request: dict[str, Any], size: Size) -> None:
    """Creates the data, trains the models, and writes both to a new folder."""
    paths = _paths(work)
    losses: dict[str, dict[str, float]] = {}
    started = time.perf_counter()

    def report(phase: str, note: str) -> None:
        nonlocal started
        print(f"[hera demo] {phase}: {note} ({time.perf_counter() - started:.1f} s)", flush=True)
        started = time.perf_counter()

    def save(name: str, phase: str, values: list[float], folder: Path, *parts: Any) -> None:
        for part in parts:
            part.save_pretrained(folder)
        tail = values[-max(1, len(values) // 10) :]
        first, last = round(values[0], 4), round(sum(tail) / len(tail), 4)
        losses[name] = {"steps": len(values), "first_loss": first, "last_loss": last}
        report(phase, f"{len(values)} steps, loss {first:.2f} -> {last:.2f}")

    samples = make_samples(size.train, size.held_out, request["seed"])
    rows = write_dataset(paths["data"], samples, request["seed"])
    images = [sample.image for sample in samples["train"]]
    report("data", ", ".join(f"{len(content)} {name}" for name, content in rows.items()))

    conversations = [
        [turn | {"content": turn["content"].replace("<image>", "").lstrip("\n")} for turn in row["messages"]]
        for name in ("hera_demo", "hera_demo_captions", "hera_demo_text")
        for row in rows[name]
    ]
    # The tokenizer also learns the role names, so that the header of a turn takes few tokens.
    words = (text for turns in conversations for turn in turns for text in (turn["role"], "\n" + turn["content"]))
    tokenizer = models.train_tokenizer(words)
    report("tokenizer", f"{len(tokenizer)} tokens")

    language_model = models.new_language_model(tokenizer)
    texts = [str(tokenizer.apply_chat_template(turns, tokenize=False)) for turns in conversations]
    texts += [sample.caption + models.END_OF_TEXT for sample in samples["train"]]
    values = models.train_language_model(language_model, tokenizer, texts, size.language_steps)
    save("language_model", "language model, on text", values, paths["language_model"], language_model, tokenizer)

    tower, _, values = models.train_vision_tower(images, size.vision_steps)
    llava = models.assemble_llava(language_model, tower, tokenizer)
    save("vision_tower", "vision tower, on images", values, paths["model"], *llava)

    teacher, processor, values = models.train_teacher(images, size.teacher_steps)
    save("teacher", "teacher, on images", values, paths["teacher"], teacher, processor)

    versions = {name: version(name) for name in _LIBRARIES}
    write_json(work / RECORD, {"request": request, "versions": versions, "losses": losses}, indent=1)
