"""Measures the cost of profiling and of the trust region against plain forward passes of the same samples.

    python tests/bench/calibrate.py [--rounds 3] [--threads 2] [--device cpu]
    python tests/bench/calibrate.py --shape 7b --device cuda --dtype bf16 --samples 100 --rounds 2

The model is a random LLaVA. The passes alternate in one process for several rounds, and the best round of each is
compared. At the end, a complete calibration is timed, including the files that it writes.
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from PIL import Image

from llamafactory_hera.calibration.plan import HeldOut
from llamafactory_hera.calibration.profile import AttentionFlow, HeadGates
from llamafactory_hera.calibration.run import CalibrationInputs, calibrate_heads
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.calibration.weights import HeadWeights
from llamafactory_hera.selection.passes import Forward
from llamafactory_hera.selection.samples import Features

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE = 1

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "text": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
        "vision": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2},
        "image": {"image_size": 96, "patch_size": 8},
    },
    "7b": {  # Vicuna-7B with CLIP ViT-L/14 at 336 pixels, as in LLaVA-1.5
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "image": {"image_size": 336, "patch_size": 14},
    },
}


def make_model(shape: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    sizes = SHAPES[shape]
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**sizes["vision"], **sizes["image"]),
        text_config=tf.LlamaConfig(**sizes["text"], vocab_size=32064, max_position_embeddings=4096),
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = tf.LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


class NoiseSamples:
    """An image of noise in front of random text, for each row."""

    def __init__(self, shape: str, n: int, n_text: int, dtype: torch.dtype) -> None:
        sizes = SHAPES[shape]["image"]
        self._n, self._n_text, self._dtype = n, n_text, dtype
        self._side, self._n_image = sizes["image_size"], (sizes["image_size"] // sizes["patch_size"]) ** 2

    def __len__(self) -> int:
        return self._n

    def images(self, row: int) -> list[Image.Image]:
        return [Image.effect_noise((self._side, self._side), 64).convert("RGB")]

    def encode(self, row: int) -> Features:
        generator = torch.Generator().manual_seed(row)
        text = torch.randint(2, 32000, (self._n_text,), generator=generator).tolist()
        ids = [*text[:8], *[IMAGE] * self._n_image, *text[8:]]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "row": row}

    def collate(self, features: list[Features]) -> dict[str, torch.Tensor]:
        pixels = [
            torch.randn(3, self._side, self._side, generator=torch.Generator().manual_seed(feature["row"]))
            for feature in features
        ]
        return {
            "input_ids": torch.tensor([feature["input_ids"] for feature in features]),
            "attention_mask": torch.tensor([feature["attention_mask"] for feature in features]),
            "pixel_values": torch.stack(pixels).to(self._dtype),
        }


def passes(forward: Forward, samples: NoiseSamples, args: argparse.Namespace) -> dict[str, tuple[int, Callable]]:
    """Name -> number of samples and what runs them; batches are made beforehand."""

    def batches(n: int) -> list[dict[str, torch.Tensor]]:
        rows = [samples.encode(row) for row in range(n)]
        return [samples.collate(rows[start : start + args.batch_size]) for start in range(0, n, args.batch_size)]

    profiled, probes = batches(args.samples - args.held_out), batches(args.probes)
    rows = [samples.encode(row) for row in range(args.held_out)]
    config = RahConfig(batch_size=args.batch_size)
    held_out = HeldOut(forward, HeadWeights(forward.model), rows, samples.collate, config)
    bins = samples.encode(0)["input_ids"].count(IMAGE)

    @torch.no_grad()
    def bare() -> None:
        for batch in profiled:
            forward.run(batch)

    def attention() -> None:
        with AttentionFlow(forward, bins) as flow:
            for batch in profiled:
                flow.read(batch)

    def gradients() -> None:
        with HeadGates(forward, "text") as gates:
            for batch in probes:
                gates.read(batch)

    n = args.samples - args.held_out
    return {
        "bare forward passes": (n, bare),
        "attention flow (I-SAL)": (n, attention),
        "gate gradients (CAF)": (args.probes, gradients),
        "one step of the trust region": (args.held_out, held_out.kl),
    }


def timed(run: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    model = make_model(args.shape, args.device, dtype)
    samples = NoiseSamples(args.shape, args.samples, args.text_tokens, dtype)

    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{datetime.date.today()}, {machine(args.device)}, {args.threads} threads, torch {torch.__version__}")
    print(
        f"random LLaVA of {n_parameters / 1e9:.2f}e9 parameters in {args.dtype}, batches of {args.batch_size} samples"
    )
    print(f"{len(samples.encode(0)['input_ids'])} tokens a sample; load average before: {os.getloadavg()[0]:.1f}")

    runs = passes(Forward(model), samples, args)
    best = dict.fromkeys(runs, float("inf"))
    for warm_up in (True, *[False] * args.rounds):
        for name, (_, run) in runs.items():
            seconds = timed(run, args.device)
            if not warm_up:
                best[name] = min(best[name], seconds)
    n_bare, _ = runs["bare forward passes"]
    unit = best["bare forward passes"] / n_bare
    print(f"\n{'samples':>8} {'seconds':>9}  {'a sample, against a bare pass'}")
    for name, (n, _) in runs.items():
        print(f"{n:8} {best[name]:9.3f}  {best[name] / n / unit:5.2f}x  {name}")
    profiling = best["attention flow (I-SAL)"] + best["gate gradients (CAF)"]
    print(f"\nprofiling is {profiling / best['bare forward passes']:.2f}x the bare passes of its samples")

    config = RahConfig(samples=args.samples, held_out=args.held_out, probes=args.probes, batch_size=args.batch_size)
    inputs = CalibrationInputs(samples, lambda: model, lambda _: samples.collate, "random", "noise")
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = calibrate_heads(inputs, config, Path(folder))
    print(f"a complete calibration: {time.perf_counter() - start:.1f} s")
    print(f"{len(report['heads'])} heads chosen, {len(report['calibrated'])} calibrated")
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
