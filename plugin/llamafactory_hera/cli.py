"""The command ``llamafactory-hera`` (alias ``lmf-hera``). Each subcommand imports what it needs when it runs."""

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .backbones.cli import register as register_backbones
from .integrations.llamafactory.calibration import register as register_calibration
from .integrations.llamafactory.selection import register as register_selection


def _doctor(_: argparse.Namespace) -> int:
    from hera_patches.doctor import run_doctor

    return run_doctor()


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import build_demo

    paths = build_demo(arguments.output, seed=arguments.seed, size=arguments.size, force=arguments.force)
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-hera",
        description="Head-wise representation alignment (HeRA) for LLaMA-Factory.",
        epilog="Training itself is the host's: llamafactory-cli train RECIPE.yaml with stage: hera.",
    )
    parser.add_argument("--version", action="version", version=f"llamafactory-hera {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="check the installation and say what is off")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser("demo", help="build a tiny offline model, teacher and dataset (about a minute)")
    demo.add_argument("--output", default="hera_demo", help="folder to build (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    demo.add_argument("--size", choices=("demo", "test"), default="demo", help="test: smaller and faster")
    demo.add_argument("--force", action="store_true", help="build again over an earlier demo")
    demo.set_defaults(run=_demo)

    register_selection(commands)
    register_backbones(commands)
    register_calibration(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        The exit status: 0, 1 for a failed check, 2 for bad input.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except ValueError as error:
        print(f"llamafactory-hera: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
