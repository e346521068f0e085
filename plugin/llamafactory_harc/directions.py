"""The four directions of each layer: differences of means, the scores by which layers are chosen, and their files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from llamafactory_hera.files import reading, write_json, write_safetensors
from llamafactory_hera.plots import BLUE, GRAY, GREEN, ORANGE, new_figure, plain, save_figure

#: The folder of HARC's files, inside a run's output folder and inside each checkpoint.
FOLDER = "harc"
#: The file of the base model's directions, in that folder.
DIRECTIONS = "directions.safetensors"

# The order of the first axis of all directions `[4, n, D]`. The layer l is at l - 1 on the second axis, because layer 1,
# the input of block 1, is the output of block 0; layer 0 would be the embeddings.
HARM, REFUSAL, RESPONSE_HARM, RESPONSE_REFUSAL = range(4)
_NAMES = ("harm", "refusal", "response_harm", "response_refusal")
#: The axis of positions in means ``[3, n, D]``: the last token of the instruction, that of the prompt, the response.
INSTRUCTION, PROMPT, RESPONSE = range(3)

_EDGE = 4  # layers at both ends that are never chosen, counted with the embeddings


def from_means(harmful: Tensor, harmless: Tensor, compliant: Tensor) -> Tensor:
    """Returns the directions ``[4, n, D]`` from the mean rows ``[3, n, D]`` of the classes."""
    differences = {
        HARM: harmful[INSTRUCTION] - harmless[INSTRUCTION],
        REFUSAL: harmful[PROMPT] - harmless[PROMPT],
        RESPONSE_HARM: compliant[RESPONSE] - harmless[RESPONSE],
        RESPONSE_REFUSAL: harmful[RESPONSE] - harmless[RESPONSE],
    }
    return functional.normalize(torch.stack([differences[kind] for kind in range(4)]), dim=-1, eps=1e-8)


def blend(base: Tensor, fresh: Tensor, share: float) -> Tensor:
    """Mixes the base model's directions with new ones; the result has unit length."""
    return functional.normalize((1 - share) * base + share * fresh, dim=-1)


def pair_cosines(directions: Tensor) -> dict[str, Tensor]:
    """Returns the four cosines ``[n]`` between directions of a layer that its score consists of."""
    pairs = {
        "refusal and harm, prompt": (REFUSAL, HARM),
        "refusal and harm, response": (RESPONSE_REFUSAL, RESPONSE_HARM),
        "harm, prompt and response": (HARM, RESPONSE_HARM),
        "refusal, prompt and response": (REFUSAL, RESPONSE_REFUSAL),
    }
    return {name: (directions[a] * directions[b]).sum(-1) for name, (a, b) in pairs.items()}


def scores(directions: Tensor) -> Tensor:
    """Scores the layers 1 to n; those at the edges have a score of minus infinity.

    A good layer keeps harm and refusal apart, and has similar directions at the prompt and over the response.
    """
    apart, apart_later, harm, refusal = (value.abs() for value in pair_cosines(directions).values())
    values = (1 - apart) * (1 - apart_later) * harm * refusal
    values[: _EDGE - 1] = values[max(len(values) - _EDGE, 0) :] = -torch.inf
    return values


def best_layers(directions: Tensor, count: int) -> tuple[int, ...]:
    """Returns the layers with the highest scores in ascending order."""
    values = scores(directions)
    if not (known := int(values.isfinite().sum())):
        raise ValueError(
            f"harc_layers: auto chooses none of the first and last layers, and the model has only {len(values)} blocks; "
            "name layers."
        )
    return tuple(sorted(int(index) + 1 for index in values.topk(min(count, known)).indices))


def save(folder: Path, directions: Tensor, layers: Sequence[int], provenance: dict[str, Any]) -> None:
    """Writes the directions, ``harc.json`` with scores and cosines for readers, and the picture of the cosines."""
    tensors = dict(zip(_NAMES, directions, strict=True))
    write_safetensors(folder / DIRECTIONS, tensors, {"provenance": json.dumps(provenance)})
    values = {"score": scores(directions), **pair_cosines(directions)}
    rows = [
        {"layer": number, **{name: round(float(value[number - 1]), 6) for name, value in values.items()}}
        for number in range(1, directions.shape[1] + 1)
    ]
    for row in rows:
        row["score"] = None if row["score"] == -torch.inf else row["score"]
    write_json(folder / "harc.json", {"layers": list(layers), "by_layer": rows, "provenance": provenance})
    _draw(folder / "directions.png", directions, layers)


def load(path: str | os.PathLike) -> Tensor:
    """Reads directions that :func:`save` wrote."""
    with (
        reading(f"harc_directions: {path}", "a file of llamafactory-hera harc-directions"),
        safe_open(path, "pt") as f,
    ):
        return torch.stack([f.get_tensor(name) for name in _NAMES])


def _draw(path: Path, directions: Tensor, layers: Sequence[int]) -> None:
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    for (name, values), color in zip(pair_cosines(directions).items(), (BLUE, ORANGE, GREEN, GRAY), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=color, label=name)
    for layer in layers:
        axes.axvline(layer, color=GRAY, alpha=0.3, linewidth=4, zorder=0)
    axes.set(xlabel="layer (input of the block; gray: chosen)", ylabel="cosine", ylim=(-1.05, 1.05))
    axes.legend(fontsize=7, frameon=False)
    plain(axes)
    save_figure(figure, path)
