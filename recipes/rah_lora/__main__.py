"""``python recipes/rah_lora``: two experiments of the RAH-LoRA paper, ``control`` and ``gap`` (README.md)."""

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python recipes/rah_lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    control = commands.add_parser("control", help="calibrate on the unchanged data and on corrupted images")
    control.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-hera calibrate")
    control.add_argument("--control", choices=("shuffled", "blank"), required=True, help="how to corrupt the images")
    control.usage = f"{control.prog} RECIPE.yaml --control {{shuffled,blank}} [key=value ...]"
    gap = commands.add_parser("gap", help="correlate the influence-saliency gap of calibrations with their gains")
    gap.add_argument("points", metavar="FOLDER=GAIN", nargs="+", help="a calibration, and its gain in points")
    gap.add_argument("--output", type=Path, default="rah_gap.png", help="picture to write (default: %(default)s)")
    args, overrides = parser.parse_known_args()
    # A calibration runs on one device. This must be set before torch is imported.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    import experiments

    try:
        if args.command == "control":
            print(experiments.control(args.recipe, args.control, overrides))
        elif overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        else:
            print(experiments.gap(args.points, args.output))
    except (ValueError, OSError) as error:
        print(f"rah_lora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
