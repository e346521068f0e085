"""The subcommand ``calibrate``."""

import argparse
import os

from ..selection.cli import overrides_anywhere


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    calibrate = subparsers.add_parser(
        "calibrate",
        help="calibrate attention heads without training (RAH-LoRA) into a LoRA adapter",
        description=(
            "Finds attention heads that matter and hardly look across text and image, and moves their weights towards "
            "those of heads that do, within a bound on the model's output. The result is a PEFT adapter."
        ),
    )
    calibrate.add_argument("recipe", metavar="RECIPE.yaml", help="says model, dataset, template and rah_* keys")
    calibrate.add_argument("overrides", metavar="key=value", nargs="*", help="keys over the recipe's: rah_delta=0.02")
    calibrate.add_argument(
        "--control",
        choices=("shuffled", "blank"),
        help="calibrate on shuffled or blank images, too, and say what that did",
    )
    calibrate.set_defaults(run=run_calibrate)
    overrides_anywhere(calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    """``llamafactory-hera calibrate``."""
    # at its usual level the host prints every configuration that it loads
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    # one device: the host refuses several of them in one process
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from .api import calibrate
    from .summary import render_summary

    for report in calibrate(args.recipe, args.overrides, args.control):
        print(render_summary(report))
    return 0
