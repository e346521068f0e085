"""Scores of all heads and layers: what is chosen by them, the file that holds them, and one file beside another."""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import Strategy
from ..files import RUN_FOLDER
from ..heads.targets import Granularity, Target, Targets
from ..knobs import Role
from .provenance import compared_facts

#: Heads in each group of a comparison, as in the paper.
N_COMPARED = 5
# Rows of the table in the terminal.
_ROWS = 10


def rank_targets(scores: ArrayLike) -> dict[Target, float]:
    """All heads or layers with a score, least aligned first; equal scores are ordered by layer, then head.

    Args:
        scores: ``[L, H]`` of heads or ``[L]`` of layers; NaN where there is none.
    """
    found = [(float(score), Target(*place)) for place, score in np.ndenumerate(np.asarray(scores, dtype=float))]
    return {target: score for score, target in sorted(item for item in found if not math.isnan(item[0]))}


def choose_targets(scores: ArrayLike, strategy: Strategy, m: int, seed: int = 0) -> tuple[Target, ...]:
    """Chooses ``m`` heads or layers.

    ``worst`` is the paper's choice: the least aligned, least first. ``top`` is the most aligned, most first;
    ``random`` is drawn by seed, ordered by layer and head. ``middle`` is this project's reading of the paper's
    ablation "middle layer" for single heads: the least aligned of the middle decoder layer (``L // 2``), so that
    ``m`` is the same in every strategy.

    Args:
        scores: ``[L, H]`` of heads or ``[L]`` of layers; NaN where there is none, which is never chosen.
        strategy: One of the four.
        m: How many.
        seed: For ``random``.

    Raises:
        ValueError: Fewer than ``m`` have a score.
    """
    shape = np.shape(scores)
    ranked, where = rank_targets(scores), ""
    candidates = list(ranked)
    if strategy == "middle":
        candidates = [target for target in candidates if target.layer == shape[0] // 2]
        where = f"in layer L{shape[0] // 2} "
    if len(candidates) < m:
        what = "heads" if len(shape) == 2 else "layers"
        raise ValueError(
            f"hera_select_m: {m} {what} are asked for, and {len(candidates)} {where}have a score; lower it."
        )
    if strategy == "top":
        candidates.sort(key=lambda target: (-ranked[target], target))
    if strategy == "random":
        candidates = sorted(random.Random(seed).sample(sorted(candidates), m))
    return tuple(candidates[:m])


@dataclass(frozen=True)
class ScoreFile:
    """The scores in a ``heads.json`` or a ``layers.json``; both hold those of all heads and layers.

    Attributes:
        path: The file.
        chosen: The heads or layers that were chosen.
        scores: MKNN ``[L, H]``, NaN where a head could not be scored.
        layer_scores: MKNN of each layer's own output, ``[L]``.
    """

    path: Path
    chosen: Targets
    scores: np.ndarray
    layer_scores: np.ndarray

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreFile":
        """Reads a file.

        Raises:
            ValueError: It is missing, or holds no scores.
        """
        chosen = Targets.load(path, key="scores")
        scores, layer_scores = (chosen.provenance.get(name) for name in ("scores", "layer_scores"))
        if not scores:
            raise ValueError(
                f"scores: {path} names {chosen.what} and holds no scores; make one with `llamafactory-hera score`."
            )
        # null becomes NaN
        return cls(Path(path), chosen, np.array(scores, dtype=float), np.array(layer_scores, dtype=float))

    @property
    def provenance(self) -> dict[str, Any]:
        """All that is known of the selection."""
        return self.chosen.provenance

    @property
    def chance(self) -> float:
        """The MKNN of unrelated features."""
        return self.provenance["chance_level"]

    def ranked(self, granularity: Granularity | None = None) -> dict[Target, float]:
        """All heads or layers with a score, least aligned first; by default of the kind that was chosen."""
        return rank_targets(self._of(granularity))

    def broken(self) -> list[Target]:
        """Heads, or layers where those were chosen, without a score."""
        return [Target(*map(int, place)) for place in np.argwhere(np.isnan(self._of(None)))]

    def _of(self, granularity: Granularity | None) -> np.ndarray:
        return self.scores if (granularity or self.chosen.granularity) == "head" else self.layer_scores


def render_table(scored: ScoreFile) -> str:
    """The least and the most aligned heads side by side, chosen ones starred, and each against chance; or layers."""
    facts, scores = scored.provenance, scored.ranked()
    ranked = list(scores)
    rows = min(_ROWS, len(ranked))

    def cell(target: Target) -> str:
        star = "*" if target in scored.chosen.items else " "
        return f"{target!s:>7}{star} {scores[target]:6.4f} {scores[target] / scored.chance:6.2f}x"

    title = scored.chosen.granularity
    lines = [
        f"{len(ranked)} {scored.chosen.what} on {facts['samples']} samples, k={facts['k']}, chance level "
        f"{scored.chance:.4f}",
        f"{'':3}  {'least aligned':<24}  most aligned",
        f"{'':3}  {f'{title:>7}    MKNN  /chance':<24}  {title:>7}    MKNN  /chance",
    ]
    pairs = zip(ranked[:rows], ranked[::-1][:rows], strict=True)
    lines += [f"{n:3}  {cell(worst):<24}  {cell(top)}" for n, (worst, top) in enumerate(pairs, start=1)]
    broken = scored.broken()
    if broken:
        lines.append(f"not scored (NaN or infinity): {' '.join(map(str, broken))}")
    lines.append(f"selected ({facts['strategy']}): {scored.chosen}")
    return "\n".join(lines)


# -- before and after ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Score files of one model at several times.

    Attributes:
        files: The first is "before"; where it names layers, layers are compared, else heads.
        names: A short name for each.
        groups: ``worst-5`` and ``top-5`` (or as many as there are) of the first file, each with the MKNN of its heads
            or layers in every file, NaN where it has none, and their ``mean``.
    """

    files: tuple[ScoreFile, ...]
    names: tuple[str, ...]
    groups: dict[str, dict[str, list[float]]]


def compare(paths: Sequence[str | os.PathLike], names: Sequence[str] = ()) -> Comparison:
    """Reads score files and checks that they can be set side by side.

    Args:
        paths: Two or more, "before" first.
        names: A name for each file; default: the names of their runs' folders, or as much of their paths as it takes
            to tell them apart.

    Raises:
        ValueError: Fewer than two files, files without scores, or files that were not scored on the same teacher,
            images and settings.
    """
    if len(paths) < 2:
        raise ValueError("report: give two score files or more, the one before training first.")
    if names and len(names) != len(paths):
        raise ValueError(f"report: {len(names)} names for {len(paths)} files; give one for each.")
    files = tuple(ScoreFile.load(path) for path in paths)
    for file in files[1:]:
        differing = _differing(files[0], file)
        if differing:
            raise ValueError(
                f"report: {files[0].path} and {file.path} cannot be compared, they differ in {', '.join(differing)}; "
                "score both with the same recipe."
            )
    ranked = list(files[0].ranked())
    n = min(N_COMPARED, len(ranked))
    known = [file.ranked(files[0].chosen.granularity) for file in files]
    groups = {}
    for title, targets in (("worst", ranked[:n]), ("top", ranked[::-1][:n])):
        rows = {str(target): [scores.get(target, math.nan) for scores in known] for target in targets}
        groups[f"{title}-{n}"] = rows | {"mean": [sum(column) / n for column in zip(*rows.values(), strict=True)]}
    return Comparison(files, tuple(names) or _short_names(paths), groups)


def _differing(first: ScoreFile, other: ScoreFile) -> list[str]:
    words = {"teacher_fingerprint": "teacher", "samples_digest": "images"}
    pairs = {fact: (first.provenance.get(fact), other.provenance.get(fact)) for fact in compared_facts(Role.SCORES)}
    differing = [
        f"{words.get(fact, fact)} ({_shortened(one)}, {_shortened(two)})"
        for fact, (one, two) in pairs.items()
        if one != two
    ]
    return differing + (["number of heads"] if first.scores.shape != other.scores.shape else [])


def _shortened(value: object) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) > 16 else text


def _short_names(paths: Sequence[str | os.PathLike]) -> tuple[str, ...]:
    absolute = [Path(path).absolute() for path in paths]
    for name in (_run_name, lambda path: path.stem, str):
        names = [name(path) for path in absolute]
        if len(set(names)) == len(names):
            break
    return tuple(names)


def _run_name(path: Path) -> str:
    """The folder of the run or checkpoint that a score file lies in."""
    return path.parent.parent.name if path.parent.name == RUN_FOLDER else path.parent.name


def render_markdown(comparison: Comparison, picture: str) -> str:
    """The comparison as a page with a table.

    Args:
        comparison: What to show.
        picture: The picture's path, relative to the page.
    """
    first = comparison.files[0]
    facts, what = first.provenance, first.chosen.what
    lines = [
        "# Head alignment before and after",
        "",
        f"MKNN against {facts['teacher']} on {facts['samples']} samples of {facts['dataset']}, k={facts['k']}, mode "
        f"{facts['mode']}; unrelated features reach {first.chance:.4f}. Worst and top {what} are those of "
        f"{comparison.names[0]}.",
        "",
        f"![MKNN of the worst and top {what}]({picture})",
        "",
        f"| {first.chosen.granularity} | " + " | ".join(comparison.names) + " | change |",
        "|---|" + "--:|" * (len(comparison.files) + 1),
    ]
    for title, rows in comparison.groups.items():
        for name, values in rows.items():
            shown = f"**{title} mean**" if name == "mean" else name
            columns = [f"{value:.4f}" for value in values]
            lines.append(f"| {shown} | {' | '.join(columns)} | {values[-1] - values[0]:+.4f} |")
    return "\n".join(lines) + "\n"
