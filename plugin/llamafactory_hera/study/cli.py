"""The subcommand ``study``."""

import argparse
import sys


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    study = subparsers.add_parser(
        "study", help="compare the objectives in a small rendered world (CPU, about 80 minutes)"
    )
    study.add_argument("--size", default="default", help="smoke, default or full (default: %(default)s)")
    study.add_argument("--output", help="folder of the study (default: hera_study/SIZE)")
    study.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each (%(default)s)")
    study.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``llamafactory-hera study``."""
    from .run import run_study

    try:
        print(run_study(args.output or f"hera_study/{args.size}", args.size, args.workers))
    except KeyboardInterrupt:
        print("llamafactory-hera: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
