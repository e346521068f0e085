"""Compares the time of a selection with the time of bare forward passes on the same batches.

    python benchmarks/selection.py [--samples 128] [--dim 1024] [--rounds 3] [--threads 2]

The selection begins with image files and captions, and ends with ``heads.json``. The bare passes run the teacher and
the language model on prepared batches without recording head outputs. The fastest of several rounds counts.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from PIL import Image

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.selection.passes import Forward, plan_batches
from llamafactory_hera.selection.samples import SelectionInputs, draw_samples
from llamafactory_hera.selection.select import select_targets
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import load_image

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.selection.tiny import Rows, pad_right

VOCABULARY, TOKENS, BATCH_SIZE = 2000, 64, 16


def noise(folder: Path, n: int) -> Rows:
    """Makes image files of noise, each with a caption of random tokens."""
    draw = np.random.default_rng(0)
    images, features = [], []
    for row in range(n):
        images.append([str(folder / f"{row}.jpg")])
        Image.fromarray(draw.integers(0, 256, (336, 448, 3), dtype=np.uint8)).save(images[-1][0])
        ids = draw.integers(3, VOCABULARY, draw.integers(TOKENS // 2, TOKENS * 3 // 2)).tolist()
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return Rows(images, features)


def make_inputs(folder: Path, args: argparse.Namespace) -> SelectionInputs:
    torch.manual_seed(0)
    attention = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": args.dim // 16}
    sizes = {"hidden_size": args.dim, "intermediate_size": args.dim * 11 // 4, "num_hidden_layers": 8}
    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(vocab_size=VOCABULARY, **sizes, **attention)).eval()
    model.save_pretrained(folder / "model")
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=224, patch_size=14)).save_pretrained(folder / "teacher")
    processor = tf.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    processor.save_pretrained(folder / "teacher")
    teacher = VisionTeacher.from_pretrained(str(folder / "teacher"), "cpu")
    return SelectionInputs(
        source=noise(folder, args.samples),
        load_model=lambda: model,
        collator=lambda _: pad_right,
        load_teacher=lambda: teacher,
        model_name="random",
        weights=folder / "model",
        dataset_name="noise",
    )


def bare_passes(inputs: SelectionInputs, config: HeraConfig) -> Callable[[], None]:
    """Prepares the batches, and returns a function that runs the passes."""
    samples = draw_samples(inputs.source, config)
    features = [sample.features for sample in samples]
    plan = plan_batches([len(feature["input_ids"]) for feature in features], BATCH_SIZE)
    batches = [pad_right([features[row] for row in batch]) for batch in plan]
    teacher, forward = inputs.load_teacher(), Forward(inputs.load_model(), config.select_mode)
    pixels = teacher.processor.batch([load_image(sample.image) for sample in samples]).split(BATCH_SIZE)

    @torch.no_grad()
    def passes() -> None:
        for part in pixels:
            teacher.encode(part)
        for batch in batches:
            forward.run(batch)

    return passes


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Returns the seconds and the CPU seconds of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keys = {"hera_select_samples": args.samples, "hera_select_batch_size": BATCH_SIZE}
    config = HeraConfig.from_keys({"hera_heads": "auto", "hera_teacher": "random", **keys})
    bare, selections = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder, args)
        passes = bare_passes(inputs, config)
        passes()
        for number in range(args.rounds):
            path = folder / f"round{number}/heads.json"
            bare.append(timed(passes))
            selections.append(timed(lambda path=path: select_targets(inputs, config, path)))
    for unit, title in enumerate(("seconds", "CPU seconds")):
        floor, best = (min(times[unit] for times in rounds) for rounds in (bare, selections))
        print(f"{title}: bare passes {floor:.2f}, selection {best:.2f}, ratio {best / floor:.3f} (goal: 1.05)")


if __name__ == "__main__":
    main()
