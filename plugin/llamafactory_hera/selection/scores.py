"""Scores of all heads and layers: what is chosen by them, the file that holds them, and one file beside another."""

import math
import os
import random
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..config import SCORE_KEYS, SELECTION_KEYS, Strategy
from ..files import RUN_FOLDER
from ..heads.targets import Granularity, Target, Targets
from ..keys import changes

_N_COMPARED = 5  # in each group of a comparison, as in the paper
_SCORE_FILES = ("scores.json", "heads.json", "layers.json")  # of a folder; the first is that of `score`
_ROWS = 10  # of the table in the terminal
# What tables and pictures show of a file's provenance.
_SHOWN = ("scores", "layer_scores", "chance_level", "samples", "keys", "model", "teacher", "dataset")
_PACKAGES = ("llamafactory-hera", "llamafactory", "torch", "transformers", "peft")
#: Two selections that share all of these chose the same; ``auto`` uses the earlier one again.
SAME_SELECTION = (*SELECTION_KEYS, "dataset", "model", "teacher")
#: A run must share these with the selection whose heads it trains.
SAME_RUN = ("hera_select_m", "model", "teacher")
#: Two files of scores must share these to be compared.
SAME_SCORES = (*SCORE_KEYS, "samples", "teacher")
# What is compared by a digest, with the entry that holds it.
_DIGESTS = {"model": "model_fingerprint", "teacher": "teacher_fingerprint", "samples": "samples_digest"}


def rank_targets(scores: ArrayLike) -> dict[Target, float]:
    """All heads ``[L, H]`` or layers ``[L]`` with a score, not NaN, least aligned first; equal ones in order."""
    found = [(float(score), Target(*place)) for place, score in np.ndenumerate(np.asarray(scores, dtype=float))]
    return {target: score for score, target in sorted(item for item in found if not math.isnan(item[0]))}


def choose_targets(scores: ArrayLike, strategy: Strategy, m: int, seed: int = 0) -> tuple[Target, ...]:
    """Chooses ``m`` heads by their scores ``[L, H]``, or layers by theirs ``[L]``; where one is NaN, never.

    ``worst`` is the paper's choice: the least aligned, least first. ``top`` is the most aligned, most first;
    ``random`` is drawn by seed, ordered by layer and head. ``middle`` is this project's reading of the paper's
    ablation "middle layer" for single heads: the least aligned of the middle decoder layer (``L // 2``), so that
    ``m`` is the same in every strategy.

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
            f"hera_select_m: {m} {what} are asked for, and hera_select: {strategy} has {len(candidates)} {where}to "
            "choose from; lower it."
        )
    if strategy == "top":
        candidates.sort(key=lambda target: (-ranked[target], target))
    if strategy == "random":
        candidates = sorted(random.Random(seed).sample(sorted(candidates), m))
    return tuple(candidates[:m])


@dataclass(frozen=True)
class ScoreFile:
    """The scores in a ``heads.json`` or a ``layers.json``; both hold those of all heads and layers."""

    path: Path
    chosen: Targets
    #: MKNN ``[L, H]``, NaN where a head could not be scored.
    scores: np.ndarray
    #: MKNN of each layer's own output, ``[L]``.
    layer_scores: np.ndarray

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreFile":
        """Reads a file, or a folder's scores, else its selection; raises ValueError where there are none."""
        if os.path.isdir(path):
            named = (Path(path, RUN_FOLDER, name) for name in _SCORE_FILES)
            path = next((file for file in named if file.is_file()), path)
        chosen = Targets.load(path, key="scores")
        missing = next((name for name in _SHOWN if not chosen.provenance.get(name)), None)
        if missing is not None:
            raise ValueError(
                f"scores: {path} names {chosen.what} and holds no {missing}; make one with `llamafactory-hera score`."
            )
        # null becomes NaN
        scores, layer_scores = (np.array(chosen.provenance[name], dtype=float) for name in _SHOWN[:2])
        return cls(Path(path), chosen, scores, layer_scores)

    @property
    def provenance(self) -> dict[str, Any]:
        return self.chosen.provenance

    @property
    def chance(self) -> float:
        """The MKNN of unrelated features."""
        return self.provenance["chance_level"]

    def of(self, granularity: Granularity) -> np.ndarray:
        """The scores of all heads, or of all layers."""
        return self.scores if granularity == "head" else self.layer_scores

    def ranked(self, granularity: Granularity | None = None) -> dict[Target, float]:
        """All heads or layers with a score, least aligned first; by default of the kind that was chosen."""
        return rank_targets(self.of(granularity or self.chosen.granularity))


def render_table(scored: ScoreFile) -> str:
    """The least and the most aligned heads side by side, chosen ones starred, and each against chance; or layers."""
    facts, scores = scored.provenance, scored.ranked()
    ranked = list(scores)

    def cell(target: Target) -> str:
        star = "*" if target in scored.chosen.items else " "
        return f"{target!s:>7}{star} {scores[target]:6.4f} {scores[target] / scored.chance:6.2f}x"

    title = scored.chosen.granularity
    size = f"{len(ranked)} {scored.chosen.what} on {facts['samples']} samples, k={facts['keys']['hera_select_k']}"
    lines = [
        f"{size}, chance level {scored.chance:.4f}",
        f"{'':3}  {'least aligned':<24}  most aligned",
        f"{'':3}  {f'{title:>7}    MKNN  /chance':<24}  {title:>7}    MKNN  /chance",
    ]
    pairs = zip(ranked[:_ROWS], ranked[::-1][:_ROWS], strict=True)
    lines += [f"{n:3}  {cell(worst):<24}  {cell(top)}" for n, (worst, top) in enumerate(pairs, start=1)]
    broken = [str(Target(*map(int, place))) for place in np.argwhere(np.isnan(scored.of(title)))]
    if broken:
        lines.append(f"not scored (NaN or infinity): {' '.join(broken)}")
    lines.append(f"selected ({facts['keys']['hera_select']}): {scored.chosen}")
    return "\n".join(lines)


def differences(before: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Lists the entries in which two provenances differ, as ``name was …, is …``; entries missing in the first pass.

    Args:
        before: The provenance of a selection or of scores.
        now: Another one.
        names: :data:`SAME_SELECTION`, :data:`SAME_RUN` or :data:`SAME_SCORES`.
    """
    return changes(_compared(before), _compared(now), names)


def _compared(provenance: dict[str, Any]) -> dict[str, Any]:
    digests = {
        name: f"{provenance.get(name)} (fingerprint {str(provenance[entry])[:8]})"
        for name, entry in _DIGESTS.items()
        if entry in provenance
    }
    entries = {name: value for name, value in provenance.items() if name not in _DIGESTS}
    return {**entries, **provenance.get("keys", {}), **digests}


def package_versions() -> dict[str, str]:
    """Versions of this project and of what it computes with, as far as they are installed."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command_line() -> str:
    """How this process was started, as a shell takes it, without secrets: the file may be published."""
    words = sys.orig_argv
    if Path(sys.executable).parent == Path(words[min(1, len(words) - 1)]).parent:  # a command beside its interpreter
        words = [Path(words[1]).name, *words[2:]]
    return re.sub(r"(\w*(?:hub_token|api_key|password)[= ])\S+", r"\1…", shlex.join(words))


class Comparison(NamedTuple):
    """Score files of one model at several times, "before" first, each with a short name."""

    files: Sequence[ScoreFile]
    names: Sequence[str]
    #: ``worst-5`` of the first file, or ``aligned``, and ``top-5`` of the first: each with its MKNN (or NaN) in every
    #: file, and their ``mean``.
    groups: dict[str, dict[str, list[float]]]


def compare(paths: Sequence[str | os.PathLike], names: Sequence[str] = (), aligned: str | None = None) -> Comparison:
    """Reads two or more score files, "before" first, called by their folders; refuses what cannot be compared.

    ``aligned`` are shown instead of the worst: names, or the ``heads.json`` of a run; of a run's folder its own.
    """
    of_run = len(paths) == 1 and os.path.isdir(paths[0])
    if of_run:
        run = paths[0]
        after, *selected = (Path(run, RUN_FOLDER, name) for name in _SCORE_FILES)
        paths = [next((path for path in selected if path.is_file()), selected[0]), after]
        names = names or ("before", "after")
        if missing := [str(path) for path in paths if not os.path.isfile(path)]:
            raise ValueError(
                f"report: {' and '.join(missing)} {'are' if missing[1:] else 'is'} missing: select writes "
                f"{selected[0].name}, and `llamafactory-hera score {run} --recipe RECIPE.yaml` "
                f"{after.name}; or give files of scores."
            )
    if len(paths) < 2:
        raise ValueError(
            f"report: {', '.join(map(str, paths))} is one file, or not there; give two score files or more, the one "
            "before training first, or a run's folder."
        )
    files, names = load_files(paths, names, "report")
    ranked = list(files[0].ranked())
    n = min(_N_COMPARED, len(ranked))
    known = [file.ranked(files[0].chosen.granularity) for file in files]
    least: tuple[str, Sequence[Target]] = (f"worst-{n}", ranked[:n])
    if of_run and set(files[0].chosen.items) != set(ranked[:n]):
        aligned = aligned or str(files[0].path)
    if aligned is not None:
        least = "aligned", Targets.parse(aligned, files[0].chosen.granularity).items
        scored = {Target(*place) for place in np.ndindex(files[0].of(files[0].chosen.granularity).shape)}
        if outside := [str(target) for target in least[1] if target not in scored]:
            raise ValueError(f"--aligned: {', '.join(outside)} has no score in {files[0].path}; name others.")
    groups = {}
    for title, targets in (least, (f"top-{n}", ranked[::-1][:n])):
        rows = {str(target): [scores.get(target, math.nan) for scores in known] for target in targets}
        groups[title] = rows | {"mean": [statistics.mean(column) for column in zip(*rows.values(), strict=True)]}
    return Comparison(files, names, groups)


def load_files(
    paths: Sequence[str | os.PathLike], names: Sequence[str], command: str
) -> tuple[list[ScoreFile], Sequence[str]]:
    """Reads score files of one model at several times with a name for each; refuses what cannot be compared."""
    if names and len(names) != len(paths):
        raise ValueError(f"{command}: {len(names)} names for {len(paths)} files; give one for each.")
    files = [ScoreFile.load(path) for path in paths]
    for file in files[1:]:
        differing = differences(files[0].provenance, file.provenance, SAME_SCORES)
        if files[0].scores.shape != file.scores.shape:
            differing.append("they differ in their number of heads")
        if differing:
            raise ValueError(
                f"{command}: {files[0].path} and {file.path} cannot be compared: {'; '.join(differing)}. Score both "
                "with the same recipe."
            )
    return files, names or _short_names([file.path.absolute() for file in files])


def _short_names(paths: Sequence[Path]) -> list[str]:
    folders = [path.parents[1 if path.parent.name == RUN_FOLDER else 0].name for path in paths]
    for names in (folders, [path.stem for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def render_markdown(comparison: Comparison, picture: str) -> str:
    """The comparison as a page with a table and, by its path relative to the page, the picture."""
    first = comparison.files[0]
    facts, what = first.provenance, first.chosen.what
    kind = next(iter(comparison.groups)).split("-")[0]
    least = "T" if kind == "aligned" else "Worst and t"
    lines = [
        "# Head alignment before and after",
        "",
        f"MKNN against {facts['teacher']} on {facts['samples']} samples of {facts['dataset']}, "
        f"k={facts['keys']['hera_select_k']}, mode {facts['keys']['hera_select_mode']}; unrelated features reach "
        f"{first.chance:.4f}. {least}op {what} are those of "
        f"{comparison.names[0]}.",
        "",
        f"![MKNN of the {kind} and top {what}]({picture})",
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
