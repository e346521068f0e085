"""Scoring every head: seconds and peak memory against the published per-head procedure and a bare batched product.

    python tests/bench/mknn.py [--full] [--rounds 3] [--threads 2]

Each variant runs in a process of its own, the variants in turn, several rounds; the best round of each is compared.
The published procedure is timed on a few heads and scaled to all of them, unless ``--full``. Heads share the teacher's
structure to different degrees (``--alignment``), as real heads do: rows that agree with the teacher cost more.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time

import torch

from llamafactory_hera.alignment import chance_level, nearest_neighbors, score_heads

VARIANTS = {
    "published": "published procedure (D-vectors, argsort, N x N masks)",
    "product": "bare bmm, new result for each layer",
    "product_reused": "bare bmm, result written over the last one (the strict floor)",
    "gram": "of which: W^T W of every head (does not depend on N)",
    "ours": "score_heads",
}


def published(outputs: torch.Tensor, weight: torch.Tensor, teacher_mask: torch.Tensor, k: int) -> float:
    """One head as the paper's eq. 2-3 and 7 read: contributions in R^D, all similarities, full ranking, masks."""
    contributions = torch.nn.functional.normalize(outputs @ weight.T, dim=-1)
    similarities = contributions @ contributions.T
    similarities.fill_diagonal_(-torch.inf)
    order = similarities.argsort(dim=-1, descending=True)
    mask = torch.zeros_like(similarities, dtype=torch.bool)
    mask.scatter_(1, order[:, :k], True)
    return ((mask & teacher_mask).sum(-1).float() / k).mean().item()


def make_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    width = args.heads * args.head_dim
    latent = torch.randn(args.samples, 16, generator=generator)
    neighbors = nearest_neighbors(latent, args.k)
    pooled = torch.empty(args.layers, args.samples, width)
    for layer in pooled:
        strength = args.alignment * torch.rand(args.heads, 1, generator=generator).expand(-1, args.head_dim).flatten()
        layer.normal_(generator=generator)
        layer.addmm_(latent, torch.randn(16, width, generator=generator) * strength / 4)
    weight = torch.randn(args.dim, width, generator=generator).div_(args.dim**0.5)
    return pooled.view(args.layers, args.samples, args.heads, args.head_dim), weight, neighbors


def work(variant: str, args: argparse.Namespace) -> dict:
    """Time one variant in this process; the first layer runs once before, to warm up."""
    torch.set_num_threads(args.threads)
    pooled, weight, neighbors = make_inputs(args)
    n, d, n_heads = args.samples, args.head_dim, args.layers * args.heads
    result: dict = {}
    if variant == "published":
        mask = torch.zeros(n, n, dtype=torch.bool).scatter_(1, neighbors, True)
        heads = [divmod(i, args.heads) for i in range(0, n_heads, 1 if args.full else n_heads // args.naive_heads)]

        def run(layers: range) -> list[float]:
            chosen = heads if len(layers) > 1 else heads[:1]
            return [published(pooled[i, :, h], weight[:, h * d : (h + 1) * d], mask, args.k) for i, h in chosen]

        result |= {"heads": heads}
    elif variant == "ours":

        def run(layers: range) -> list[list[float]]:
            return score_heads(pooled[: len(layers)].unbind(0), [weight] * len(layers), neighbors).tolist()
    elif variant == "gram":

        def run(layers: range) -> None:
            for _ in layers:
                for columns in weight.split(d, dim=1):
                    columns.T @ columns
    else:
        sides = pooled.transpose(1, 2).contiguous()
        del pooled
        reused = torch.empty(args.heads, n, n) if variant == "product_reused" else None

        def run(layers: range) -> None:
            for i in layers:
                torch.bmm(sides[i], sides[i].mT, out=reused)

    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # forget the peak of making the inputs
    run(range(1))
    start, cpu_start = time.perf_counter(), time.process_time()
    result["scores"] = run(range(args.layers))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    scale = n_heads / len(result["heads"]) if variant == "published" else 1
    result |= {"seconds": seconds * scale, "cpu_seconds": cpu_seconds * scale}
    return result | {"scale": scale, "extra_bytes": memory("VmHWM") - before}


def memory(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def count_alike(args: argparse.Namespace, naive: dict, ours: dict) -> tuple[int, int]:
    """On how many of the naively scored heads ours agrees with the published procedure, in fp32 and in fp64."""
    pooled, weight, neighbors = make_inputs(args)
    d = args.head_dim
    mask = torch.zeros(args.samples, args.samples, dtype=torch.bool).scatter_(1, neighbors, True)
    single = double = 0
    for (layer, head), score in zip(naive["heads"], naive["scores"], strict=True):
        columns = weight[:, head * d : (head + 1) * d].double()
        exact = published(pooled[layer, :, head].double(), columns, mask, args.k)
        single += abs(ours["scores"][layer][head] - score) < 1e-6
        double += abs(ours["scores"][layer][head] - exact) < 1e-6
    return single, double


def cpu_name() -> str:
    with open("/proc/cpuinfo") as info:
        return next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--alignment", type=float, default=0.6, help="0: every head scores at chance level")
    parser.add_argument("--naive-heads", type=int, default=16, help="heads on which the published procedure is timed")
    parser.add_argument("--full", action="store_true", help="time the published procedure on every head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args)))
        return

    rounds: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    loads = []
    for _ in range(args.rounds):
        for variant in VARIANTS:
            loads.append(os.getloadavg()[0])
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", variant]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            rounds[variant].append(json.loads(output.splitlines()[-1]))
    best = {variant: min(results, key=lambda result: result["seconds"]) for variant, results in rounds.items()}

    n_heads = args.layers * args.heads
    print(f"{datetime.date.today()}, {cpu_name()}, {args.threads} threads, torch {torch.__version__}")
    print(f"{n_heads} heads, N={args.samples}, D={args.dim}, d={args.head_dim}, k={args.k}, {args.rounds} rounds")
    print(f"load average of the machine before the runs: {min(loads):.1f} to {max(loads):.1f}")
    print(f"\n{'best s':>8} {'worst s':>8} {'CPU s':>8} {'extra MB':>9}")
    for variant, title in VARIANTS.items():
        worst = max(result["seconds"] for result in rounds[variant])
        extra = best[variant]["extra_bytes"] / 1e6
        print(
            f"{best[variant]['seconds']:8.2f} {worst:8.2f} {best[variant]['cpu_seconds']:8.2f} {extra:9.0f}  {title}"
        )
    naive, ours = best["published"], best["ours"]
    if naive["scale"] > 1:
        print(
            f"The published procedure ran on {len(naive['heads'])} heads, its seconds are times {naive['scale']:.1f}."
        )
    gram = best["gram"]
    without_gram = {unit: ours[unit] - gram[unit] for unit in ("seconds", "cpu_seconds")}

    def ratio(over: dict, under: dict) -> str:
        wall, cpu = (over[unit] / under[unit] for unit in ("seconds", "cpu_seconds"))
        return f"{wall:5.2f}x ({cpu:.2f}x in CPU seconds)"

    print(f"\n{ratio(naive, ours)} published procedure / score_heads (goal: at least 10)")
    print(f"{ratio(ours, best['product'])} score_heads / bare product")
    print(f"{ratio(ours, best['product_reused'])} score_heads / bare product into reused memory")
    print(f"{ratio(without_gram, best['product_reused'])} the same, W^T W left out")
    single, double = count_alike(args, naive, ours)
    print(f"same score as the published procedure: {double} of {len(naive['heads'])} heads in fp64, {single} in fp32")
    scores = torch.tensor(ours["scores"])
    chance = chance_level(args.samples, args.k)
    print(f"MKNN of the heads: {scores.min():.3f} to {scores.max():.3f}, chance level {chance:.4f}")


if __name__ == "__main__":
    main()
