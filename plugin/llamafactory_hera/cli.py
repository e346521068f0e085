"""The command ``llamafactory-hera``. Each subcommand imports what it needs when it runs."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__
from .backbones.table import VISION_MODEL

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-hera",
        description="Head-wise representation alignment (HeRA) for LLaMA-Factory.",
        epilog="Training itself is the host's: llamafactory-cli train RECIPE.yaml with stage: hera.",
    )
    parser.add_argument("--version", action="version", version=f"llamafactory-hera {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    command("doctor", _doctor, "check the installation and say how to fix what does not fit")

    demo = command("demo", _demo, "build a tiny offline model, teacher and dataset (about a minute)")
    demo.add_argument("--output", default="hera_demo", help="folder to build (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="seed of data and weights (default: %(default)s)")
    demo.add_argument("--size", choices=("demo", "test"), default="demo", help="test: smaller and faster")
    demo.add_argument("--force", action="store_true", help="build again over an earlier demo")

    select = command("select", _select, "score every attention head and write the run's recipe")
    select.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-cli train")
    select.add_argument("--in-place", action="store_true", help="write the heads into the recipe itself, too")
    select.add_argument("--force", action="store_true", help="replace the heads of a run that has trained there")
    select.add_argument("--teacher-only", action="store_true", help="only fill hera_teacher_cache for all samples")
    _take_overrides(select, "hera_select_mode=mllm")

    score = command("score", _score, "score every attention head of checkpoints or adapters")
    scored = "models and adapters, or a recipe's own model"
    score.add_argument("targets", metavar="CHECKPOINT|RECIPE.yaml", nargs="+", help=scored)
    score.add_argument("--recipe", metavar="RECIPE.yaml", help="says dataset, template, teacher and settings")
    score.add_argument("--output", metavar="FILE.json", help="default: hera/scores.json in the checkpoint's folder")
    _take_overrides(score, "hera_select_mode=mllm")

    report = command("report", _report, "compare head scores before and after training")
    several = "files or folders of select and score, the one before training first"
    report.add_argument("files", metavar="SCORES", nargs="+", help=f"{several}; or the folder of one run")
    report.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    aligned = "heads or layers to show instead of the worst of the first file: names, or a run's heads.json"
    report.add_argument("--aligned", metavar="HEADS", help=aligned)
    written = "OUTPUT.png and OUTPUT.md are written (default: hera_report, and with --html neither)"
    report.add_argument("--output", help=written)
    report.add_argument("--html", metavar="FILE.html", help="write one page with everything, which needs no network")

    gallery = command("gallery", _gallery, "draw which images a head takes for neighbors, beside the teacher's")
    gallery.add_argument("files", metavar="SCORES", nargs="+", help=several)
    gallery.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    drawn = "names, or a file of them (default: the worst, median and best of the first file)"
    gallery.add_argument("--heads", metavar="HEADS", help=drawn)
    gallery.add_argument("--output", default="hera_gallery", help="OUTPUT_L3H4.png is written for each (%(default)s)")

    evaluate = command("eval", _eval, "evaluate models and adapters with lmms-eval, beside the paper's table")
    evaluate.add_argument("models", metavar="MODEL", nargs="*", help="folder or hub id; differences are to the first")
    evaluate.add_argument("--suite", default="demo", help="demo, paper or hallucination (default: %(default)s)")
    evaluate.add_argument("--tasks", metavar="TASK", nargs="+", default=(), help="some of the suite's tasks")
    evaluate.add_argument("--data", metavar="FOLDER", help="data that lie here: a folder or .json for each task")
    evaluate.add_argument("--output", metavar="DIR", default="saves/eval", help="results go there (%(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=16, help="samples in a batch (default: %(default)s)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="N samples of each task, to try it; enters no table")
    evaluate.add_argument("--check", action="store_true", help="only say what each task lacks; no model is loaded")
    evaluate.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each model")
    evaluate.add_argument("--paper", metavar="BACKBONE", help="of the paper's columns, for instance qwen3_8b")
    aspect = "pad: images become squares in the mean color first; models built with pad need none (%(default)s)"
    evaluate.add_argument("--image-aspect-ratio", choices=("none", "pad"), default="none", help=aspect)

    build = command("build", _build, "assemble a LLaVA-style model, for stage 1, from an LLM and a vision encoder")
    build.add_argument("--language-model", required=True, help="folder or hub id, for instance Qwen/Qwen3-8B")
    vision = "folder or hub id of a CLIP, SigLIP, SigLIP2 or DINOv2 model (default: %(default)s)"
    build.add_argument("--vision-model", default=VISION_MODEL, help=vision)
    build.add_argument("--output", required=True, help="folder to make")
    aspect = "pad: images become squares in the mean color first, as in LLaVA-1.5's stage 2 (default: %(default)s)"
    build.add_argument("--image-aspect-ratio", choices=("square", "pad"), default="square", help=aspect)
    build.add_argument("--seed", type=int, default=0, help="seed of the projector (default: %(default)s)")
    build.add_argument("--shard-gib", type=float, default=4.0, help="largest weight file, GiB (default: %(default)s)")

    recipes = command("recipes", _recipes, "list the shipped recipes with what each does, or copy them into a folder")
    recipes.add_argument("name", nargs="*", help="show only recipes whose name contains one of these")
    recipes.add_argument("--copy-to", metavar="FOLDER", help="copy all of them, with dataset_info.json and deepspeed/")

    calibrate = command("calibrate", _calibrate, "calibrate attention heads without training (RAH-LoRA): an adapter")
    calibrate.add_argument("recipe", metavar="RECIPE.yaml", help="says model, dataset, template and rah_* keys")
    control = "calibrate on shuffled or blank images, too, and say what that did"
    calibrate.add_argument("--control", choices=("shuffled", "blank"), help=control)
    _take_overrides(calibrate, "rah_delta=0.02")

    gap = command("gap", _gap, "correlate the influence-saliency gap of calibrations with what they gained")
    gap.add_argument("measured", metavar="FOLDER=GAIN", nargs="+", help="a calibration, and its gain in points")
    gap.add_argument("--output", default="rah_gap.png", help="picture to write (default: %(default)s)")
    return parser


def _take_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Lets ``key=value`` s stand before and behind a parser's options; they become its ``overrides``."""
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help=f"keys over the recipe's, for instance {example}"
    )
    # argparse takes a list of positional arguments from one place only, not from before and behind an option
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        own: list[str] = []
        overrides: list[str] = []
        for before, arg in zip(("", *args), args, strict=False):
            option = parser._option_string_actions.get(before)
            is_value = option is not None and option.nargs is None
            is_own = is_value or not _OVERRIDE.fullmatch(arg) or Path(arg).exists()
            (own if is_own else overrides).append(arg)
        parsed, rest = parse(own, namespace)
        parsed.overrides += overrides
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0, 1 for a failed check, 2 for bad input."""
    parsed = _parser().parse_args(arguments)
    if parsed.run in (_select, _score, _calibrate):
        # at its usual level the host prints every configuration that it loads, and the table would be lost in them
        os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    status = _relaunched() if parsed.run in (_select, _score) else None
    if status is not None:
        return status
    try:
        status = parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"llamafactory-hera: {error}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:
        from .distributed import end_launch

        end_launch()
    return status


# -- the subcommands -------------------------------------------------------------------------------------------------


def _doctor(_: argparse.Namespace) -> int:
    from hera_patches.doctor import run_doctor

    return run_doctor()


def _demo(args: argparse.Namespace) -> int:
    from .demo import build_demo

    paths = build_demo(args.output, seed=args.seed, size=args.size, force=args.force)
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))
    return 0


def _select(args: argparse.Namespace) -> int:
    from .integrations.llamafactory.commands import fill_teacher, select

    if args.teacher_only:
        fill_teacher(args.recipe, args.overrides)
    else:
        select(args.recipe, args.overrides, in_place=args.in_place, force=args.force)
    return 0


def _score(args: argparse.Namespace) -> int:
    from .hub import local_folder
    from .integrations.llamafactory.commands import score_checkpoint

    if args.output and len(args.targets) > 1:
        raise ValueError("--output: one file cannot take the scores of several; leave it out.")
    for target in args.targets[1:]:  # before the first one's hours; that one tells for itself
        if not Path(target).exists():
            local_folder(target, "CHECKPOINT", "a model or of an adapter")
    for target in args.targets:
        is_recipe = Path(target).suffix in (".yaml", ".yml", ".json")
        recipe = target if is_recipe else args.recipe
        print(score_checkpoint(None if is_recipe else target, recipe, args.output, args.overrides))
    return 0


def _report(args: argparse.Namespace) -> int:
    from .selection.pictures import write_report

    if args.output or not args.html:
        print(*write_report(args.files, args.output or "hera_report", args.names, args.aligned), sep="\n")
    if args.html:
        from .selection.page import write_page

        print(write_page(args.files, args.html, args.names, args.aligned))
    return 0


def _gallery(args: argparse.Namespace) -> int:
    from .selection.gallery import write_gallery

    print(*write_gallery(args.files, args.output, args.names, args.heads), sep="\n")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from .evaluation.run import evaluate

    return evaluate(**{name: value for name, value in vars(args).items() if name != "run"})


def _build(args: argparse.Namespace) -> int:
    from .backbones.build import build_backbone

    print(f"reading {args.language_model} and {args.vision_model}", flush=True)
    options = (args.seed, args.shard_gib, args.image_aspect_ratio)
    built = build_backbone(args.language_model, args.vision_model, args.output, *options)
    print(f"{built.folder}: {built.n_parameters:,} parameters")
    print(f"<image> is token {built.image_token_id}; an image takes {built.image_tokens} tokens of cutoff_len")
    print(f"template: llava_plain in stage 1, {built.template or 'none that is known here'} in stage 2")
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .backbones.shipped import copy_recipes, shipped_recipes

    if args.copy_to is not None:
        print(f"{len(copy_recipes(args.copy_to))} recipes copied to {args.copy_to}")
        return 0
    found = shipped_recipes()
    chosen = {n: t for n, t in found.items() if not args.name or any(part in n for part in args.name)}
    if not chosen:
        raise ValueError(f"recipes: no recipe's name contains {' or '.join(args.name)}; there are {', '.join(found)}.")
    width = max(map(len, chosen))
    print("\n".join(f"{name:<{width}}  {title}" for name, title in chosen.items()))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    # one device: the host refuses several of them in one process
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from .calibration.report import render_summary
    from .integrations.llamafactory.commands import calibrate

    for report in calibrate(args.recipe, args.overrides, args.control):
        print(render_summary(report))
    return 0


def _gap(args: argparse.Namespace) -> int:
    from .calibration.report import correlate_gains

    print(correlate_gains(args.measured, Path(args.output)))
    return 0


def _relaunched() -> int | None:
    """Runs this command again under torchrun when several devices are there, or ``FORCE_TORCHRUN`` asks for it.

    It is launched as the host's environment variables say. Returns its exit status, or None: go on in this process.
    """
    import torch

    environment, n_devices = os.environ, torch.accelerator.device_count()
    forced = environment.get("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1")
    if "LOCAL_RANK" in environment or (not forced and n_devices <= 1):  # a launcher started this process, or none need
        return None
    options = [f"--nproc-per-node={environment.get('NPROC_PER_NODE', max(1, n_devices))}"]
    if "MASTER_ADDR" in environment or "NNODES" in environment:
        defaults = {"NNODES": 1, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        options += [
            f"--{name.lower().replace('_', '-')}={environment.get(name, value)}" for name, value in defaults.items()
        ]
    else:
        options.append("--standalone")
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "llamafactory_hera.cli", *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
