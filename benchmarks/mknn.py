"""Compares the speed of ``score_heads`` with the published procedure: ``python benchmarks/mknn.py [--threads 1]``.

Each variant runs in a new process, and the fastest of several rounds counts. The published procedure runs on a few
heads, and its time is scaled to all heads. Like real heads, the simulated heads are aligned to different degrees.
"""

import argparse
import multiprocessing
import os
import time

import torch

from llamafactory_hera.alignment import nearest_neighbors, score_heads

K, N_PUBLISHED = 10, 8  # neighbors, and heads that the published procedure scores
VARIANTS = {
    "published": "published procedure: contributions of size D, a sort of every row, N x N masks",
    "scores": "score_heads",
    "product": "a bare batched product of the head outputs",
    "gram": "W^T W of every head, which is part of score_heads",
}


def published(outputs: torch.Tensor, weight: torch.Tensor, teacher_mask: torch.Tensor) -> float:
    """Scores one head exactly as in the paper's eq. 2, 3 and 7, with all similarities, a full ranking, and masks."""
    contributions = torch.nn.functional.normalize(outputs @ weight.T, dim=-1)
    similarities = contributions @ contributions.T
    similarities.fill_diagonal_(-torch.inf)
    order = similarities.argsort(dim=-1, descending=True)
    mask = torch.zeros_like(similarities, dtype=torch.bool).scatter_(1, order[:, :K], True)
    return ((mask & teacher_mask).sum(-1).float() / K).mean().item()


def make_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Makes head outputs ``[L, N, H, d]``, a weight ``[D, H*d]`` and the teacher's neighbors ``[N, k]``."""
    generator = torch.Generator().manual_seed(0)
    width = args.heads * args.head_dim
    latent = torch.randn(args.samples, 16, generator=generator)
    pooled = torch.empty(args.layers, args.samples, width)
    for layer in pooled:
        strength = 0.6 * torch.rand(args.heads, generator=generator).repeat_interleave(args.head_dim)
        layer.normal_(generator=generator)
        layer.addmm_(latent, torch.randn(16, width, generator=generator) * strength / 4)
    weight = torch.randn(args.dim, width, generator=generator).div_(args.dim**0.5)
    return pooled.unflatten(2, (args.heads, -1)), weight, nearest_neighbors(latent, K)


def measure(variant: str, args: argparse.Namespace) -> tuple[float, float]:
    """Returns the seconds and the CPU seconds that a variant takes for all heads."""
    torch.set_num_threads(args.threads)
    pooled, weight, neighbors = make_inputs(args)
    n_heads, scale, parts = args.layers * args.heads, 1.0, weight.split(args.head_dim, dim=1)
    heads = [divmod(i, args.heads) for i in range(0, n_heads, n_heads // N_PUBLISHED)]
    teacher_mask = torch.zeros(args.samples, args.samples, dtype=torch.bool).scatter_(1, neighbors, True)
    start, cpu_start = time.perf_counter(), time.process_time()
    if variant == "published":
        scale = n_heads / len(heads)
        for layer, head in heads:
            published(pooled[layer, :, head], parts[head], teacher_mask)
    elif variant == "scores":
        score_heads(pooled.unbind(0), [weight] * args.layers, neighbors)
    elif variant == "product":
        for layer in pooled:
            torch.bmm(layer.transpose(0, 1), layer.permute(1, 2, 0))
    else:
        for part in parts * args.layers:
            part.T @ part
    return scale * (time.perf_counter() - start), scale * (time.process_time() - cpu_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    best = {}
    for variant, title in VARIANTS.items():
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            best[variant] = min(pool.starmap(measure, [(variant, args)] * args.rounds, chunksize=1))
        print(f"{best[variant][0]:8.2f} s {best[variant][1]:8.2f} CPU s  {title}")
    print(f"score_heads is {best['published'][1] / best['scores'][1]:.1f} times as fast in CPU seconds (goal: 10)")


if __name__ == "__main__":
    main()
