"""Scores of all heads and layers: their ranking, the choice among them, and the file that contains them."""

import math
import os
import random
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import SCORE_KEYS, SELECTION_KEYS, Strategy
from ..files import RUN_FOLDER, reading
from ..heads.targets import Granularity, Target, Targets
from ..keys import changes
from .firmness import Firmness

#: Files of scores, or folders of runs.
Paths = Sequence[str | os.PathLike]
#: The files with scores in a run's folder: of the trained model, of the model before training, and of selections.
SCORE_FILES = ("scores.json", "before.json", "heads.json", "layers.json")
SELECTIONS = SCORE_FILES[2:]
#: Two selections that share these entries choose the same targets, so ``auto`` reuses the earlier one.
SAME_SELECTION = (*SELECTION_KEYS, "dataset", "model", "teacher")
#: A run must share these entries with the selection whose heads it trains.
SAME_RUN = ("hera_select_m", "model", "teacher")
#: Two files of scores must share these entries to be compared.
SAME_SCORES = (*SCORE_KEYS, "samples", "teacher")
# Entries that are compared by a digest -> the entry with the digest.
_DIGESTS = {"model": "model_fingerprint", "teacher": "teacher_fingerprint", "samples": "samples_digest"}


def rank_targets(scores: ArrayLike) -> dict[Target, float]:
    """Ranks all heads ``[L, H]`` or layers ``[L]`` that have a score, least aligned first, then by index."""
    found = [(float(score), Target(*place)) for place, score in np.ndenumerate(np.asarray(scores, dtype=float))]
    return {target: score for score, target in sorted(item for item in found if not math.isnan(item[0]))}


def choose_targets(scores: ArrayLike, strategy: Strategy, m: int, seed: int = 0) -> tuple[Target, ...]:
    """Chooses ``m`` heads by their MKNN ``[L, H]``, or layers by MKNN ``[L]``; skips targets without a score (NaN).

    ``worst``, the paper's choice, starts with the least aligned target, and ``top`` with the most aligned; ``random``
    draws targets. ``middle`` takes the least aligned heads of the decoder layer ``L // 2``. This is our reading of the
    paper's ablation "middle layer", and it keeps ``m`` the same for every strategy.
    """
    ranked, shape = rank_targets(scores), np.shape(scores)
    candidates = list(ranked)
    if strategy == "middle":
        candidates = [target for target in candidates if target.layer == shape[0] // 2]
    if len(candidates) < m:
        found = f"{len(candidates)} {'heads' if len(shape) == 2 else 'layers'} that hera_select: {strategy}"
        raise ValueError(f"hera_select_m: {m} is more than the {found} can choose from; lower it.")
    if strategy == "top":
        candidates.sort(key=lambda target: (-ranked[target], target))
    if strategy == "random":
        candidates = sorted(random.Random(seed).sample(sorted(candidates), m))
    return tuple(candidates[:m])


@dataclass(frozen=True)
class ScoreFile:
    """The content of a file of scores: the scores of all heads and layers, and the choice of a selection."""

    path: Path
    chosen: Targets
    provenance: dict[str, Any]
    chance: float  #: The MKNN that unrelated features reach on average.
    scores: np.ndarray  #: MKNN of the heads, ``[L, H]``, NaN without a score.
    layer_scores: np.ndarray  #: MKNN of the outputs of the layers, ``[L]``.
    firmness: Firmness  #: How firm the choice is.

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ScoreFile":
        """Reads a file, or a run folder's scores or else selection; raises ``ValueError`` if there are no scores."""
        if os.path.isdir(path):
            files = (Path(path, folder, name) for folder in (RUN_FOLDER, ".") for name in SCORE_FILES)
            path = next((file for file in files if file.is_file()), path)
        chosen = Targets.load(path, key="scores")
        origin = chosen.provenance
        if not origin.get("scores"):
            raise ValueError(f"scores: {path} has no scores; write a file with `llamafactory-hera score`.")
        with reading(path, "a file of scores that a selection or `llamafactory-hera score` wrote"):
            heads, layers = (np.array(origin[name], dtype=float) for name in ("scores", "layer_scores"))
            lacking = {"model", "teacher", "dataset", "keys", "samples"} - origin.keys()
            if lacking or heads.ndim != 2 or layers.shape != heads.shape[:1] or np.isnan(heads).all():
                raise ValueError(f"it lacks {', '.join(lacking) or 'scores of matching shapes'}")
            firmness = Firmness(**origin["firmness"])
            _ = firmness.table, firmness.note, firmness.warning  # raise if entries have other types
            return cls(Path(path), chosen, origin, origin["chance_level"], heads, layers, firmness)

    @property
    def marked(self) -> Targets | None:
        """The targets that a selection chose or, for other scores in a run's folder, the run's targets, if known."""
        if self.path.name in SELECTIONS:
            return self.chosen
        path = next(filter(Path.is_file, map(self.path.with_name, SELECTIONS)), None)
        return None if path is None else Targets.load(path)

    @property
    def folder(self) -> Path:
        """The folder of the run or the model, or of the file itself."""
        return self.path.absolute().parents[self.path.parent.name == RUN_FOLDER]

    @property
    def k(self) -> int:
        """The number of neighbors per sample: ``hera_select_k``, or fewer if there were few samples."""
        return round(self.chance * (self.provenance["samples"] - 1))

    @property
    def setting(self) -> str:
        """The samples, the teacher and the settings in words."""
        origin, keys = self.provenance, self.provenance["keys"]
        return (
            f"{origin['samples']} samples of {origin['dataset']}, teacher {origin['teacher']}, mode "
            f"{keys.get('hera_select_mode')}, k={self.k}, chance level {self.chance:.4f}"
        )

    def ranked(self, granularity: Granularity | None = None) -> dict[Target, float]:
        """Ranks heads or layers, by default those of the selection's granularity, least aligned first."""
        by_head = (granularity or self.chosen.granularity) == "head"
        return rank_targets(self.scores if by_head else self.layer_scores)


def load_files(paths: Paths, names: Sequence[str], command: str) -> tuple[list[ScoreFile], Sequence[str]]:
    """Reads score files of one model, with a name for each; raises ``ValueError`` if they cannot be compared."""
    if names and len(names) != len(paths):
        raise ValueError(f"{command}: {len(names)} names for {len(paths)} files; give one name for each file.")
    files = [ScoreFile.load(path) for path in paths]
    for file in files[1:]:
        differing = differences(files[0].provenance, file.provenance, SAME_SCORES)
        if files[0].scores.shape != file.scores.shape:
            differing.append("they differ in their number of heads")
        if differing:
            problem = f"{files[0].path} and {file.path} cannot be compared: {'; '.join(differing)}"
            raise ValueError(f"{command}: {problem}. Score both with the same recipe.")
    folders = [file.folder.name for file in files]
    return files, names or (folders if len(set(folders)) == len(files) else [str(file.path) for file in files])


def render_table(scored: ScoreFile) -> str:
    """Renders the least and the most aligned heads or layers side by side; a star marks selected or aligned ones."""
    ranked, marked = scored.ranked(), scored.marked
    cells = [
        f"{target!s:>7}{'*' if marked and target in marked.items else ' '} {score:6.4f} {score / scored.chance:6.2f}x"
        for target, score in ranked.items()
    ]
    head = f"{scored.chosen.granularity:>7}    MKNN  /chance"
    lines = [f"{len(ranked)} {scored.chosen.plural} on {scored.setting}"]
    lines += [f"     {'least aligned':<24}  most aligned", f"     {head:<24}  {head}"]
    lines += [f"{n:3}  {worst:<24}  {top}" for n, worst, top in zip(range(1, 11), cells, cells[::-1], strict=False)]
    values = scored.scores if scored.chosen.granularity == "head" else scored.layer_scores
    if broken := [str(Target(*map(int, place))) for place in np.argwhere(np.isnan(values))]:
        lines.append(f"no score (NaN or infinity): {' '.join(broken)}")
    if scored.path.name in SELECTIONS:
        lines.append(f"selected ({scored.provenance['keys'].get('hera_select')}): {scored.chosen}")
    lines += [
        "".join(f"{cell:>{width}}" for cell, width in zip(row, (7, 9, 9, 18, 8, 11), strict=True))
        for row in scored.firmness.table
    ]
    lines.append(scored.firmness.note)
    return "\n".join(lines)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Lists the named entries that differ in two provenances, as ``name was …, is …``; the first may lack entries."""
    # models with equal digests are the same, whatever their names and folders
    same = {name for name, digest in _DIGESTS.items() if digest in before and before[digest] == now.get(digest)}

    def compared(provenance: Mapping[str, Any]) -> dict[str, Any]:
        entries = {name: value for name, value in provenance.items() if name not in _DIGESTS}
        for name, digest in _DIGESTS.items():
            if digest in provenance:
                entries[name] = f"{provenance.get(name)} (fingerprint {str(provenance[digest])[:8]})"
        return entries | provenance.get("keys", {})

    return changes(compared(before), compared(now), [name for name in names if name not in same])


def package_versions() -> dict[str, str]:
    """Returns the versions of the installed packages that affect results."""
    found = {}
    for name in ("llamafactory-hera", "llamafactory", "torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def command_line() -> str:
    """Returns the command that started this process, without secrets, because it may be published."""
    words = sys.orig_argv
    if Path(sys.executable).parent == Path(words[min(1, len(words) - 1)]).parent:  # a script of the same environment
        words = [Path(words[1]).name, *words[2:]]
    return re.sub(r"(\w*(?:hub_token|api_key|password)[= ])\S+", r"\1…", shlex.join(words))
