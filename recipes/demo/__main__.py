"""``python recipes/demo``: builds the tiny model, teacher and dataset of the demo (about a minute, offline)."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository, so that this folder is `recipes.demo`

from recipes.demo.build import SIZES, build_demo  # noqa: E402


def main() -> int:
    """Runs the command; returns 0, or 2 if the folder cannot be written or must not be replaced."""
    parser = argparse.ArgumentParser(prog="python recipes/demo", description=__doc__)
    parser.add_argument("--output", default="hera_demo", help="folder to create (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and the weights (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="test builds less data and trains less")
    parser.add_argument("--force", action="store_true", help="replace an earlier demo")
    compared = "also train with and without HeRA in saves/, and compare the models; --seed then seeds training, too"
    parser.add_argument("--compare", action="store_true", help=compared)
    options = parser.parse_args()
    if options.compare and options.output != "hera_demo":
        parser.error("--compare needs --output hera_demo, as in the recipes; run it in another folder.")
    try:
        if options.compare:
            from recipes.demo.verdict import compare  # importing it takes seconds

            print(compare(options.seed, options.size, options.force))
            return 0
        paths = build_demo(options.output, options.seed, options.size, options.force)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
