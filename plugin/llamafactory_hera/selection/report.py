"""Worst and top heads, or layers, before and after training (paper, fig. 3 right), as a picture and as Markdown."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_text
from .provenance import COMPARABLE
from .score_file import ScoreFile

#: Heads in each group, as in the paper.
N_HEADS = 5


@dataclass(frozen=True)
class Comparison:
    """Score files of one model at several times, by heads, or by layers where the first file names layers.

    Attributes:
        files: The first is "before".
        names: A short name for each.
        worst: The least aligned of the first file, least first.
        top: Its most aligned, most first.
    """

    files: tuple[ScoreFile, ...]
    names: tuple[str, ...]
    worst: tuple[str, ...]
    top: tuple[str, ...]

    @property
    def what(self) -> str:
        """``heads`` or ``layers``."""
        return self.files[0].chosen.WHAT

    def values(self, file: ScoreFile, names: Sequence[str]) -> list[float]:
        """MKNN of some heads or layers in one file, NaN where it has none, and their mean."""
        known = file.by_name(self.what)
        values = [known.get(name, math.nan) for name in names]
        return [*values, sum(values) / len(values)]


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
    first = files[0]
    for file in files[1:]:
        other = [
            f"{words} ({_shown(first.provenance.get(key))}, {_shown(file.provenance.get(key))})"
            for key, words in COMPARABLE.items()
            if first.provenance.get(key) != file.provenance.get(key)
        ]
        if [len(row) for row in first.scores] != [len(row) for row in file.scores]:
            other.append("number of heads")
        if other:
            raise ValueError(
                f"report: {first.path} and {file.path} cannot be compared, they differ in {', '.join(other)}; score "
                "both with the same recipe."
            )
    ranked = list(first.by_name(first.chosen.WHAT))
    n = min(N_HEADS, len(ranked))
    return Comparison(files, tuple(names) or _short_names(paths), tuple(ranked[:n]), tuple(ranked[::-1][:n]))


def write_report(
    paths: Sequence[str | os.PathLike], output: str | os.PathLike = "hera_report", names: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Writes ``OUTPUT.png`` and ``OUTPUT.md``.

    Args:
        paths: Score files, "before" first.
        output: Path without a suffix.
        names: A name for each file.

    Returns:
        The picture and the Markdown file.

    Raises:
        ValueError: As :func:`compare`, or the output cannot be written.
    """
    comparison = compare(paths, names)
    base = Path(output)
    picture, page = base.with_name(f"{base.name}.png"), base.with_name(f"{base.name}.md")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        _draw(comparison, picture)
        write_text(page, render_markdown(comparison, picture.name))
    except OSError as error:
        raise ValueError(
            f"report: {base} cannot be written ({error.strerror or error}); give another path."
        ) from error
    return picture, page


def render_markdown(comparison: Comparison, picture: str) -> str:
    """The comparison as a page with a table.

    Args:
        comparison: What to show.
        picture: The picture's path, relative to the page.
    """
    first = comparison.files[0]
    lines = [
        "# Head alignment before and after",
        "",
        f"MKNN against {first.provenance['teacher']} on {first.n_samples} samples of {first.provenance['dataset']}, "
        f"k={first.k}, mode {first.provenance['mode']}; unrelated features reach {first.chance:.4f}. Worst and top "
        f"{comparison.what} are those of {comparison.names[0]}.",
        "",
        f"![MKNN of the worst and top {comparison.what}]({picture})",
        "",
        f"| {comparison.what.removesuffix('s')} | " + " | ".join(comparison.names) + " | change |",
        "|---|" + "--:|" * (len(comparison.files) + 1),
    ]
    for title, names in (("worst", comparison.worst), ("top", comparison.top)):
        columns = [comparison.values(file, names) for file in comparison.files]
        lines += [
            f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + f" | {values[-1] - values[0]:+.4f} |"
            for name, *values in zip([*names, f"**{title}-{len(names)} mean**"], *columns, strict=True)
        ]
    return "\n".join(lines) + "\n"


def _draw(comparison: Comparison, target: Path) -> None:
    from .figure import SERIES, new_figure, plain, save_figure

    n_files = len(comparison.files)
    figure = new_figure(max(8.0, 1.6 + 2.2 * n_files), 3.8)
    both = figure.subplots(1, 2, sharey=True)
    groups = ((f"worst-{len(comparison.worst)}", comparison.worst), (f"top-{len(comparison.top)}", comparison.top))
    for axes, (title, sites) in zip(both, groups, strict=True):
        width = 0.8 / n_files
        for position, (file, name) in enumerate(zip(comparison.files, comparison.names, strict=True)):
            places = [place + (position - (n_files - 1) / 2) * width for place in range(len(sites) + 1)]
            values = comparison.values(file, sites)
            axes.bar(places, values, width * 0.92, color=SERIES[position % len(SERIES)], label=name)
        axes.axhline(comparison.files[0].chance, color="black", linestyle="--", linewidth=1, label="chance")
        axes.axvline(len(sites) - 0.5, color="black", linewidth=0.6)
        axes.set_xticks(range(len(sites) + 1), [*sites, "mean"], fontsize=8)
        axes.set_title(f"{title} {comparison.what} of {comparison.names[0]}", fontsize=10)
        plain(axes)
    both[0].set_ylabel("MKNN")
    chance, *bars = zip(*both[0].get_legend_handles_labels(), strict=True)
    handles, labels = zip(*bars, chance, strict=True)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, n_files + 1), fontsize=8, frameon=False)
    save_figure(figure, target)


def _short_names(paths: Sequence[str | os.PathLike]) -> tuple[str, ...]:
    absolute = [Path(path).absolute() for path in paths]
    for name in (_run_name, lambda path: path.stem, str):
        names = [name(path) for path in absolute]
        if len(set(names)) == len(names):
            break
    return tuple(names)


def _run_name(path: Path) -> str:
    """The folder of the run or checkpoint that a score file lies in."""
    return path.parent.parent.name if path.parent.name == "hera" else path.parent.name


def _shown(value: object) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) > 16 else text
