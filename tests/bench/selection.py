"""A whole selection against the bare forward passes of the same batches: seconds, and where the rest goes.

    python tests/bench/selection.py [--samples 128] [--dim 1024] [--rounds 3] [--threads 2]

Whole: from a dataset of image files and captions to ``heads.json``, as ``select_targets`` does it; the model is loaded
in both cases. Bare: the teacher and the language model on batches that were made before, nothing captured, nothing
read back. The model is random, so its size is a choice; a larger one makes everything but its passes weigh less.
Rounds alternate, each in this process; the fastest of each is compared, in seconds and in CPU seconds.

It cannot be called ``select.py``: a script's folder is searched first, and that name is the standard library's.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.selection import resolve
from llamafactory_hera.selection.passes import Forward, plan_batches
from llamafactory_hera.selection.samples import Features, SelectionInputs
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import load_image

# Suffix of the CPU seconds of a name.
CPU = " (CPU)"

#: What is timed inside of a selection: names in ``selection.resolve``, with words for them.
STAGES = {
    "draw_samples": "drawing and hashing samples",
    "_teacher_neighbors": "teacher: decoding, passes, cache, neighbors",
    "model_fingerprint": "fingerprint of the model",
    "pooled_outputs": "model: passes and averages",
    "score_heads": "scores of heads",
    "score_features": "scores of layers",
}


class Rows:
    """Captions of random tokens, each with an image file."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        noise = np.random.default_rng(args.seed)
        self._paths, self._features = [], []
        for row in range(args.samples):
            path = folder / f"{row}.jpg"
            Image.fromarray(noise.integers(0, 256, (336, 448, 3), dtype=np.uint8)).save(path)
            ids = noise.integers(3, args.vocabulary, noise.integers(args.tokens // 2, args.tokens * 3 // 2)).tolist()
            self._paths.append(str(path))
            self._features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})

    def __len__(self) -> int:
        return len(self._paths)

    def images(self, row: int) -> list[str]:
        return [self._paths[row]]

    def encode(self, row: int) -> Features:
        return self._features[row]


def collate(rows: list[Features]) -> dict[str, torch.Tensor]:
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad_sequence([torch.tensor(row[name]) for row in rows], True, pad) for name, pad in padding.items()}


def make_inputs(folder: Path, args: argparse.Namespace) -> SelectionInputs:
    torch.manual_seed(args.seed)
    text = tf.Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.dim,
        intermediate_size=args.dim * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.dim // args.head_dim,
        num_key_value_heads=args.dim // args.head_dim // 4,
        head_dim=args.head_dim,
    )
    model = tf.Qwen3ForCausalLM(text).eval().to(args.device, getattr(torch, args.dtype))
    model.save_pretrained(folder / "model")
    vision = tf.Dinov2Config(
        hidden_size=args.teacher_dim,
        num_hidden_layers=args.teacher_layers,
        num_attention_heads=args.teacher_dim // 64,
        image_size=224,
        patch_size=14,
    )
    tf.Dinov2Model(vision).save_pretrained(folder / "teacher")
    tf.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(
        folder / "teacher"
    )
    teacher = VisionTeacher.from_pretrained(str(folder / "teacher"), args.device)
    return SelectionInputs(
        source=Rows(folder, args),
        load_model=lambda: model,
        collator=lambda _: collate,
        load_teacher=lambda: teacher,
        model_name="random",
        weights=folder / "model",
        dataset_name="noise",
        num_workers=args.workers,
    )


def bare_passes(inputs: SelectionInputs, config: HeraConfig) -> Callable[[], dict[str, float]]:
    """Prepares everything; what it returns runs the passes and says how long each kind took."""
    samples = resolve.draw_samples(inputs.source, config)
    features = [sample.features for sample in samples]
    plan = plan_batches([len(feature["input_ids"]) for feature in features], config.select_batch_size)
    model, teacher = inputs.load_model(), inputs.load_teacher()
    batches = [collate([dict(features[row]) for row in batch]) for batch in plan]
    pixels = teacher.processor.batch([load_image(sample.image) for sample in samples]).split(config.select_batch_size)
    forward = Forward(model, config.select_mode)

    def passes() -> dict[str, float]:
        seconds = {}
        with torch.no_grad(), timed(seconds, "teacher"):
            for part in pixels:
                teacher.encode(part)
        with torch.no_grad(), timed(seconds, "model"):
            for batch in batches:
                forward.run(batch)
        return seconds

    return passes


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    yield
    wait()
    for unit, spent in (("", time.perf_counter() - start), (CPU, time.process_time() - cpu_start)):
        seconds[name + unit] = seconds.get(name + unit, 0.0) + spent


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def stages(seconds: dict[str, float]) -> Iterator[None]:
    """Times the parts of a selection."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with timed(seconds, name):
                return function(*args, **kwargs)

        return call

    before = {name: getattr(resolve, name) for name in STAGES}
    vars(resolve).update({name: wrap(name, function) for name, function in before.items()})
    try:
        yield
    finally:
        vars(resolve).update(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="mean length of a caption")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--teacher-dim", type=int, default=384)
    parser.add_argument("--teacher-layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result there, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    keys = {"hera_select_samples": args.samples, "hera_select_batch_size": args.batch_size}
    config = HeraConfig.from_keys({"hera_heads": "auto", "hera_teacher": "random", **keys})

    bare: list[dict[str, float]] = []
    whole: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder, args)
        passes = bare_passes(inputs, config)
        passes()
        for number in range(args.rounds):
            bare.append(passes())
            seconds: dict[str, float] = defaultdict(float)
            with stages(seconds), timed(seconds, "whole"):
                resolve.select_targets(inputs, config, folder / f"round{number}/heads.json")
            whole.append(dict(seconds))
    floor = min(bare, key=lambda seconds: seconds["teacher"] + seconds["model"])
    best = min(whole, key=lambda seconds: seconds["whole"])
    ratios = [best["whole" + unit] / (floor["teacher" + unit] + floor["model" + unit]) for unit in ("", CPU)]

    print(f"{args.samples} captions of {args.tokens} tokens; {args.layers} layers, D={args.dim}, d={args.head_dim}")
    print(f"{platform.machine()}, {args.device}, {args.dtype}, {args.threads} threads, torch {torch.__version__}")
    print(f"load average before and after: {load:.1f}, {os.getloadavg()[0]:.1f}")
    print(f"\n{'s':>8} {'CPU s':>8}")
    stages_sum = {"rest" + unit: sum(best[name + unit] for name in STAGES) for unit in ("", CPU)}
    best |= {"rest" + unit: best["whole" + unit] - stages_sum["rest" + unit] for unit in ("", CPU)}
    lines = [(floor, "teacher", "bare passes of the teacher"), (floor, "model", "bare passes of the model")]
    lines += [(best, "whole", "whole selection, of which")]
    lines += [(best, name, f"  {words}") for name, words in STAGES.items()] + [(best, "rest", "  everything else")]
    for seconds, name, words in lines:
        print(f"{seconds[name]:8.2f} {seconds[name + CPU]:8.2f}  {words}")
    print(f"\n{ratios[0]:.3f}x ({ratios[1]:.3f}x in CPU seconds) whole selection / bare passes (goal: at most 1.10)")
    if args.json is not None:
        facts = {"date": datetime.date.today().isoformat(), "args": vars(args) | {"json": None}, "ratio": ratios}
        args.json.write_text(json.dumps(facts | {"bare": bare, "whole": whole}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
