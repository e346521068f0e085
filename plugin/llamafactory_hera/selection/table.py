"""The result of a selection as a table for the terminal."""

from .score_file import ScoreFile

_ROWS = 10


def render_table(scored: ScoreFile) -> str:
    """The least and the most aligned heads side by side, chosen ones starred, and each against chance; or layers."""
    what = scored.chosen.WHAT
    scores = scored.by_name(what)
    ranked = list(scores)
    rows = min(_ROWS, len(ranked))
    worst, top = ranked[:rows], ranked[::-1][:rows]
    chosen = set(scored.chosen.names)

    def cell(name: str) -> str:
        return f"{name:>7}{'*' if name in chosen else ' '} {scores[name]:6.4f} {scores[name] / scored.chance:6.2f}x"

    title = what.removesuffix("s")
    lines = [
        f"{len(ranked)} {what} on {scored.n_samples} samples, k={scored.k}, chance level {scored.chance:.4f}",
        f"{'':3}  {'least aligned':<24}  most aligned",
        f"{'':3}  {f'{title:>7}    MKNN  /chance':<24}  {title:>7}    MKNN  /chance",
    ]
    lines += [f"{n:3}  {cell(a):<24}  {cell(b)}" for n, (a, b) in enumerate(zip(worst, top, strict=True), start=1)]
    if scored.broken:
        lines.append(f"not scored (NaN or infinity): {' '.join(scored.broken)}")
    lines.append(f"selected ({scored.strategy}): {scored.chosen}")
    return "\n".join(lines)
