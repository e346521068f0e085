"""The subcommands ``select``, ``score`` and ``report``."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

_OVERRIDES = "keys over the recipe's, for instance hera_select_mode=mllm"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the three subcommands."""
    select = subparsers.add_parser("select", help="score every attention head and write the run's recipe")
    select.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-cli train")
    select.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)
    select.add_argument("--in-place", action="store_true", help="write the heads into the recipe itself, too")
    select.add_argument(
        "--teacher-only", action="store_true", help="only fill hera_teacher_cache for the whole dataset"
    )
    select.set_defaults(run=run_select)
    overrides_anywhere(select)

    score = subparsers.add_parser("score", help="score every attention head of a checkpoint or an adapter")
    score.add_argument("target", metavar="CHECKPOINT|RECIPE.yaml", help="a model, an adapter, or a recipe's own model")
    score.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)
    score.add_argument("--recipe", metavar="RECIPE.yaml", help="says dataset, template, teacher and settings")
    score.add_argument("--output", metavar="FILE.json", help="default: hera/scores.json in the checkpoint's folder")
    score.set_defaults(run=run_score)
    overrides_anywhere(score)

    report = subparsers.add_parser("report", help="compare head scores before and after training")
    report.add_argument("files", metavar="SCORES.json", nargs="+", help="score files, the one before training first")
    report.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    report.add_argument("--output", default="hera_report", help="OUTPUT.png and OUTPUT.md are written (%(default)s)")
    report.set_defaults(run=run_report)


def overrides_anywhere(parser: argparse.ArgumentParser) -> None:
    """Lets ``key=value`` s stand before and behind a parser's options; they become its ``overrides``."""
    # argparse takes a list of positional arguments from one place only, not from before and behind an option
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        parsed, rest = parse([arg for arg in args if not _OVERRIDE.fullmatch(arg)], namespace)
        parsed.overrides += [arg for arg in args if _OVERRIDE.fullmatch(arg)]
        return parsed, rest

    parser.parse_known_args = parse_known_args


def run_select(args: argparse.Namespace) -> int:
    """``llamafactory-hera select``."""
    _quiet_host()
    from .launch import relaunched

    status = relaunched()
    if status is not None:
        return status
    if args.teacher_only:
        from .api import fill_teacher

        fill_teacher(args.recipe, args.overrides)
        return 0
    from .api import select

    select(args.recipe, args.overrides, in_place=args.in_place)
    return 0


def run_score(args: argparse.Namespace) -> int:
    """``llamafactory-hera score``."""
    _quiet_host()
    from .api import score_checkpoint
    from .launch import relaunched

    status = relaunched()
    if status is not None:
        return status
    is_recipe = Path(args.target).suffix in (".yaml", ".yml", ".json")
    recipe = args.target if is_recipe else args.recipe
    print(score_checkpoint(None if is_recipe else args.target, recipe, args.output, args.overrides))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """``llamafactory-hera report``."""
    from .report import write_report

    for path in write_report(args.files, args.output, args.names):
        print(path)
    return 0


def _quiet_host() -> None:
    # at its usual level the host prints every configuration that it loads, and the table would be lost in them
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
