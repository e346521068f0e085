"""The four directions of each layer (differences of means), the scores that choose layers, and the files of both."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from llamafactory_hera.files import reading, write_json, write_safetensors
from llamafactory_hera.plots import GRAY, new_figure, plain, save_figure, series_colors

#: The folder of HARC's files in each output folder and each checkpoint, and the file of the directions in it.
FOLDER, DIRECTIONS = "harc", "directions.safetensors"

# The first axis of directions `[4, n, D]`. On the second axis, layer l has index l - 1: layer 1 is the input of block
# 1, which is the output of block 0. Layer 0 would be the embeddings.
_NAMES = ("harm", "refusal", "response_harm", "response_refusal")
_EDGE = 4  # number of layers never chosen at each end, counting the embeddings


def from_means(harmful: Tensor, harmless: Tensor, compliant: Tensor) -> Tensor:
    """Returns directions ``[4, n, D]`` from means ``[3, n, D]`` at the instruction, prompt and response."""
    harm, refusal, later_refusal = harmful - harmless
    later_harm = compliant[2] - harmless[2]
    return functional.normalize(torch.stack([harm, refusal, later_harm, later_refusal]), dim=-1, eps=1e-8)


def blend(base: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Mixes the base model's directions with new ones; the result has unit length."""
    return functional.normalize((1 - share) * base + share * fresh, dim=-1)


def pair_cosines(directions: Tensor) -> dict[str, Tensor]:
    """Returns the four cosines ``[n]`` between the directions of a layer."""
    harm, refusal, later_harm, later_refusal = directions
    return {
        "refusal and harm, prompt": (refusal * harm).sum(-1),
        "refusal and harm, response": (later_refusal * later_harm).sum(-1),
        "harm, prompt and response": (harm * later_harm).sum(-1),
        "refusal, prompt and response": (refusal * later_refusal).sum(-1),
    }


def scores(directions: Tensor) -> Tensor:
    """Scores layers 1 to n: high if harm and refusal differ, but prompt and response agree; -inf near both ends."""
    apart, later_apart, harm, refusal = (value.abs() for value in pair_cosines(directions).values())
    values = (1 - apart) * (1 - later_apart) * harm * refusal
    values[: _EDGE - 1] = values[-_EDGE:] = -torch.inf
    return values


def best_layers(directions: Tensor, count: int) -> tuple[int, ...]:
    """Returns the highest-scoring layers in ascending order."""
    values = scores(directions)
    if not (known := int(values.isfinite().sum())):
        raise ValueError(f"harc_layers: auto needs 8 blocks, but the model has {len(values)}; name the layers.")
    return tuple(sorted(index + 1 for index in values.topk(min(count, known)).indices.tolist()))


def save(folder: Path, directions: Tensor, layers: Sequence[int], provenance: dict[str, Any]) -> None:
    """Writes the directions, ``harc.json`` with scores and cosines, and a plot of the cosines."""
    directions = directions.cpu()
    write_safetensors(folder / DIRECTIONS, dict(zip(_NAMES, directions, strict=True)))
    pairs = pair_cosines(directions)
    table = {name: value.tolist() for name, value in {"score": scores(directions), **pairs}.items()}
    table["score"] = [value if value > -torch.inf else None for value in table["score"]]
    write_json(folder / "harc.json", {"layers": [*layers], "by_layer_from_1": table, "provenance": provenance})
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    colors = series_colors([*pairs])
    for name, values in pairs.items():
        axes.plot(range(1, len(values) + 1), values, label=name, color=colors[name])
    for layer in layers:
        axes.axvline(layer, color=GRAY, alpha=0.3, linewidth=4, zorder=0)
    axes.set(xlabel="layer l, the input of block l (gray: chosen)", ylabel="cosine", ylim=(-1.05, 1.05))
    axes.legend(fontsize=7, frameon=False)
    plain(axes)
    save_figure(figure, folder / "directions.png")


def load(path: str | os.PathLike) -> Tensor:
    """Reads directions that ``save`` wrote."""
    with reading(f"harc_directions: {path}", "a file written by llamafactory-hera harc-directions"):
        tensors = load_file(path)
        return torch.stack([tensors[name] for name in _NAMES])
