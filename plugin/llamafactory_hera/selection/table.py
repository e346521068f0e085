"""The result of a selection as a table for the terminal."""

from ..heads.head_set import HeadId
from .score_file import ScoreFile

_ROWS = 10


def render_table(scored: ScoreFile) -> str:
    """The least and the most aligned heads side by side, chosen heads starred, and each against chance."""
    ranked = scored.ranking()
    rows = min(_ROWS, len(ranked))
    worst, top = ranked[:rows], ranked[::-1][:rows]
    chosen = set(scored.heads)

    def cell(head: HeadId) -> str:
        score = scored.score(head)
        return f"{head!s:>7}{'*' if head in chosen else ' '} {score:6.4f} {score / scored.chance:6.2f}x"

    lines = [
        f"{len(ranked)} heads on {scored.n_samples} samples, k={scored.k}, chance level {scored.chance:.4f}",
        f"{'':3}  {'least aligned':<24}  most aligned",
        f"{'':3}  {'   head    MKNN  /chance':<24}     head    MKNN  /chance",
    ]
    lines += [f"{n:3}  {cell(a):<24}  {cell(b)}" for n, (a, b) in enumerate(zip(worst, top, strict=True), start=1)]
    if scored.broken:
        lines.append(f"not scored (NaN or infinity): {' '.join(map(str, scored.broken))}")
    lines.append(f"selected ({scored.strategy}): {','.join(map(str, scored.heads))}")
    return "\n".join(lines)
