"""The ``llamafactory-hera`` command. Each subcommand imports its modules when it runs."""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

from . import __version__
from .backbones.table import LANGUAGE_MODELS, VISION_MODEL
from .integrations.llamafactory import STAGES, require_host


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamafactory-hera",
        description="Head-wise representation alignment (HeRA) for LLaMA-Factory.",
        epilog="To train, set stage: hera in RECIPE.yaml and run llamafactory-cli train RECIPE.yaml.",
    )
    parser.add_argument("--version", action="version", version=f"llamafactory-hera {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        return added

    doctor = command("doctor", _doctor, "check the installation, or check a recipe without loading weights")
    doctor.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="a recipe for llamafactory-cli train")
    doctor.add_argument("--processes", type=int, default=1, help="number of processes (default: %(default)s)")
    _take_overrides(doctor)

    select = command("select", _select, "score every attention head and write a recipe with the selected heads")
    select.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-cli train")
    select.add_argument("--in-place", action="store_true", help="also write the heads into the recipe itself")
    select.add_argument("--force", action="store_true", help="replace the heads even if a run has trained with them")
    select.add_argument("--teacher-only", action="store_true", help="only cache the teacher's features of all samples")
    _take_overrides(select)

    score = command("score", _score, "score every attention head of models and adapters")
    score.add_argument("checkpoints", metavar="CHECKPOINT|RECIPE.yaml", nargs="+", help="models, adapters or recipes")
    score.add_argument("--recipe", metavar="RECIPE.yaml", help="recipe with the dataset, template and teacher")
    score.add_argument("--output", metavar="FILE.json", help="default: CHECKPOINT/hera/scores.json")
    _take_overrides(score)

    report = command("report", _report, "write a page about a run: its heads before and after training")
    several = "score files or their folders; list the file from before training first"
    report.add_argument("files", metavar="SCORES", nargs="+", help=f"{several}; or one scored run's folder")
    report.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    report.add_argument("--aligned", metavar="HEADS", help="head names or a heads.json (default: the last run's)")
    report.add_argument("--eval", metavar="FOLDER", help="output folder of llamafactory-hera eval, to add its tables")
    report.add_argument("--output", default="hera_report", help="writes OUTPUT.html (default: %(default)s)")

    gallery = command("gallery", _gallery, "show the images that a head and the teacher consider most similar")
    gallery.add_argument("files", metavar="SCORES", nargs="+", help=several)
    gallery.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    gallery.add_argument("--heads", help="names or a heads.json (default: the first file's worst, median and best)")
    gallery.add_argument("--small", action="store_true", help="write only OUTPUT.png, with two queries and one head")
    gallery.add_argument("--output", default="hera_gallery", help="writes OUTPUT_L3H4.png etc. (default: %(default)s)")

    heads = command("heads", _heads, "share selected heads on the hub (push), or fetch them (pull)")
    heads.add_argument("action", choices=("push", "pull"))
    heads.add_argument("source", help="push: a run or a heads.json; pull: the repository id, OWNER/NAME")
    heads.add_argument("target", help="push: OWNER/NAME, new or existing; pull: a folder")
    heads.add_argument("--private", action="store_true", help="push: make a new repository private")

    evaluate = command("eval", _eval, "evaluate models and adapters with lmms-eval, and add the paper's numbers")
    evaluate.add_argument("models", metavar="MODEL", nargs="*", help="folder or hub id; the first is the reference")
    evaluate.add_argument("--suite", default="demo", help="demo, paper, hallucination, or a .json file of questions")
    evaluate.add_argument("--tasks", metavar="TASK", nargs="+", default=(), help="run only these tasks of the suite")
    evaluate.add_argument("--data", metavar="FOLDER", help="folder with a subfolder per task (default: use the hub)")
    evaluate.add_argument("--output", metavar="DIR", default="saves/eval", help="results (default: %(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=16, help="samples per batch (default: %(default)s)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="use only the first N samples of each task")
    evaluate.add_argument("--check", action="store_true", help="only list each task's missing requirements")
    evaluate.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each model")
    evaluate.add_argument("--paper", metavar="BACKBONE", choices=LANGUAGE_MODELS, help="add the paper's columns")
    aspect = "pad: pad images to squares with the mean color; models built with pad always do so (%(default)s)"
    evaluate.add_argument("--image-aspect-ratio", choices=("none", "pad"), default="none", help=aspect)

    build = command("build", _build, "assemble a LLaVA-style model from an LLM and a vision encoder")
    build.add_argument("--language-model", required=True, help="folder or hub id, for example Qwen/Qwen3-8B")
    build.add_argument("--vision-model", default=VISION_MODEL, help="CLIP, SigLIP, SigLIP2 or DINOv2 (%(default)s)")
    build.add_argument("--output", required=True, help="new or empty folder for the model")
    aspect = "pad: pad images to squares with the mean color, like LLaVA-1.5 in stage 2 (default: %(default)s)"
    build.add_argument("--image-aspect-ratio", choices=("square", "pad"), default="square", help=aspect)
    build.add_argument("--seed", type=int, default=0, help="seed of the projector (default: %(default)s)")

    recipes = command("recipes", _recipes, "list the shipped recipes, or copy them")
    recipes.add_argument("name", nargs="*", help="list only recipes with one of these words in their names")
    recipes.add_argument("--copy-to", metavar="FOLDER", help="copy recipes to FOLDER/recipes; run them from FOLDER")

    calibrate = command("calibrate", _calibrate, "calibrate attention heads without training (RAH-LoRA)")
    calibrate.add_argument("recipe", metavar="RECIPE.yaml", help="recipe with the model, dataset and rah_* keys")
    _take_overrides(calibrate)

    for name, function, help in filter(None, (stage.command for stage in STAGES.values())):
        added = command(name, partial(_of_stage, function), help)
        added.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-cli train")
        _take_overrides(added)
    return parser


def _take_overrides(parser: argparse.ArgumentParser) -> None:
    """Declares ``key=value`` arguments; ``main`` also collects any that follow an option."""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the recipe's")


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-") and not os.path.exists(word)


def _is_recipe(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml", ".json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns 0, 1 for a failed check, or 2 for bad input."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        parser.error("train: set stage: hera in a recipe, and run llamafactory-cli train RECIPE.yaml")
    parsed, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if not (hasattr(parsed, "overrides") and _is_override(word))]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    if parsed.run in (_select, _score, _calibrate):
        # at its default log level, the host prints every configuration that it loads, which would bury the table
        os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    several = parsed.run in (_select, _score) or (parsed.run is _eval and not parsed.check)
    try:
        _check_words(parsed)
        if parsed.run in (_select, _score, _calibrate):
            require_host(patches=parsed.run is not _calibrate)
        if several and (status := _relaunched(arguments)) is not None:
            return status
        status = parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"llamafactory-hera: {error}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:
        from .distributed import end_launch

        end_launch()
    return status


def _check_words(args: argparse.Namespace) -> None:
    """Refuses missing files and stray words before a command spends seconds on importing torch or the host."""
    models, recipe = getattr(args, "checkpoints", []), getattr(args, "recipe", None)
    # a hub id has one slash, and no local folder has its owner's name
    local = [name for name in models if name.count("/") != 1 or os.path.isdir(os.path.dirname(name))]
    for name in (*local, *getattr(args, "files", ()), *([recipe] if recipe else [])):
        if not os.path.exists(name) and not _is_override(name):
            raise ValueError(f"{name}: no such file or folder.")
    overrides = getattr(args, "overrides", ())
    if stray := [word for word in overrides if "=" not in word]:
        place = "put the recipe first" if _is_recipe(stray[0]) else "write a pair like output_dir=saves/run"
        raise ValueError(f"{stray[0]} is not key=value; {place}.")
    words = [*models, *overrides]
    if args.run is _score and not recipe and not any(_is_recipe(w) or w.startswith("dataset=") for w in words):
        raise ValueError(f"score: {models[0]} needs a dataset; add --recipe RECIPE.yaml.")


# -- the subcommands -------------------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    gc.disable()  # garbage collection would take a quarter of the time, but imports leave no garbage
    if args.recipe is not None:
        from .integrations.llamafactory.dry_run import check_recipe

        return check_recipe(args.recipe, args.overrides, args.processes)
    from .doctor import run_doctor

    return run_doctor()


def _select(args: argparse.Namespace) -> int:
    from .integrations.llamafactory.commands import fill_teacher, select

    if args.teacher_only:
        fill_teacher(args.recipe, args.overrides)
    else:
        select(args.recipe, args.overrides, in_place=args.in_place, force=args.force)
    return 0


def _score(args: argparse.Namespace) -> int:
    from .integrations.llamafactory.commands import score_checkpoint

    overrides = [*filter(_is_override, args.checkpoints), *args.overrides]
    checkpoints = [name for name in args.checkpoints if name not in overrides]
    if args.output and len(checkpoints) > 1:
        raise ValueError("--output: one file cannot contain the scores of several models; remove the option.")
    for name in checkpoints:
        checkpoint, recipe = (None, name) if _is_recipe(name) else (name, args.recipe)
        score_checkpoint(checkpoint, recipe, args.output, overrides)
    return 0


def _report(args: argparse.Namespace) -> int:
    from .selection.report import compare

    comparison = compare(args.files, args.names, args.aligned)
    from .selection.page import verdict, write_report  # imports torch, which a refusal does not need

    print(write_report(comparison, args.output, args.eval), *verdict(comparison), sep="\n")
    return 0


def _gallery(args: argparse.Namespace) -> int:
    from .selection.gallery import write_gallery

    print(*write_gallery(args.files, args.output, args.names, args.heads, args.small), sep="\n")
    return 0


def _heads(args: argparse.Namespace) -> int:
    from .selection import share

    if args.action == "push":
        print(f"pushed to {share.push(args.source, args.target, args.private)}; use hera_heads: hf:{args.target}")
    else:
        print(f"wrote {share.pull(args.source, args.target)}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    from .evaluation.run import evaluate

    # LLaMA-Factory, which writes this log, trains with the line break that LLaVA's data have after an image.
    return evaluate(args, image_newline=lambda folder: (folder / "trainer_log.jsonl").is_file())


def _build(args: argparse.Namespace) -> int:
    from .backbones.build import build_backbone

    print(f"reading {args.language_model} and {args.vision_model}", flush=True)
    built = build_backbone(args.language_model, args.vision_model, args.output, args.seed, args.image_aspect_ratio)
    print(f"{built.folder}: {built.n_parameters:,} parameters")
    print(f"<image> is token {built.image_token_id}; an image takes {built.image_tokens} tokens of cutoff_len")
    print(f"template: llava_plain in stage 1, {built.template or '(none known for this model)'} in stage 2")
    return 0


def _recipes(args: argparse.Namespace) -> int:
    from .backbones.table import copy_recipes, shipped_recipes

    if args.copy_to is not None:
        print(f"copied to {copy_recipes(args.copy_to)}; run them from {args.copy_to}")
        return 0
    found = shipped_recipes()
    chosen = {n: t for n, t in found.items() if not args.name or any(part in n for part in args.name)}
    if not chosen:
        raise ValueError(f"recipes: no name contains {' or '.join(args.name)}; give no name to list all recipes.")
    width = max(map(len, chosen))
    print("\n".join(f"{name:<{width}}  {title}" for name, title in chosen.items()))
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    # The host refuses several devices in one process.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from .calibration.report import render_summary
    from .calibration.run import calibrate_heads
    from .files import locked
    from .integrations.llamafactory.commands import read_calibration

    inputs, config, folder = read_calibration(args.recipe, args.overrides)
    with locked(folder):
        report = calibrate_heads(inputs, config, folder)
    print(render_summary(report), "wrote:", f"  {folder}/calibration.json", f"  {folder}/calibration.png", sep="\n")
    if report["calibrated"]:
        print(f"  {folder}/adapter_model.safetensors\nto use the adapter:\n  adapter_name_or_path: {folder}")
    return 0


def _of_stage(function: str, args: argparse.Namespace) -> int:
    require_host()
    resolve_name(function)(args.recipe, args.overrides)
    return 0


def _relaunched(arguments: Sequence[str]) -> int | None:
    """Reruns this command with one process per device and returns the exit status, or None if one process is enough.

    ``FORCE_TORCHRUN=1`` and ``NPROC_PER_NODE`` have the same effect as in llamafactory-cli.
    """
    import torch

    n_devices = torch.accelerator.device_count()
    forced = os.environ.get("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1")
    if "LOCAL_RANK" in os.environ or (n_devices <= 1 and not forced):  # launched already, or no need
        return None
    n_processes = os.environ.get("NPROC_PER_NODE", max(1, n_devices))
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    command = [sys.executable, "-m", *launcher, "-m", "llamafactory_hera.cli", *arguments]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
