"""Selection, scoring and reports of a recipe: functions, and the subcommands ``select``, ``score`` and ``report``."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamafactory_hera.heads import Targets

RUN_YAML = "run.yaml"
_OVERRIDES = "keys over the recipe's, for instance hera_select_mode=mllm"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def select(recipe: str | os.PathLike, overrides: Sequence[str] = (), in_place: bool = False) -> "Targets":
    """Selects heads for a recipe and writes ``output_dir/hera/`` : ``heads.json``, ``run.yaml`` and ``heads.png``.

    Args:
        recipe: A recipe of the host; its model, dataset, template and teacher are used.
        overrides: ``key=value`` s over the recipe, for instance ``hera_select_mode=mllm``.
        in_place: Write the heads into the recipe itself, too.

    Returns:
        The heads with their provenance.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    from llamafactory_hera.alignment.gather import rank
    from llamafactory_hera.files import RUN_FOLDER
    from llamafactory_hera.heads.targets import file_name
    from llamafactory_hera.selection.pictures import show
    from llamafactory_hera.selection.run_yaml import set_heads_in_place, write_run_yaml
    from llamafactory_hera.selection.select import select_targets

    from .inputs import selection_inputs
    from .recipe import named_output, read_recipe

    read = read_recipe(recipe, overrides)
    if read.config.granularity != "head":
        raise ValueError(
            f"hera_granularity: {recipe} aligns layers, and heads are selected here; hera_layers: auto selects layers "
            "before training."
        )
    path = named_output(read.values, "saves/selection") / RUN_FOLDER / file_name("head")
    heads = select_targets(selection_inputs(read.config, *read.arguments), read.config, path)
    if rank() == 0:
        show(path)
        write_run_yaml(read.path, read.overrides, heads, path, path.with_name(RUN_YAML))
        if in_place:
            set_heads_in_place(Path(recipe), heads)
    return heads


def fill_teacher(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> int:
    """Computes the teacher's features of a recipe's whole dataset into its ``hera_teacher_cache``.

    Returns:
        Number of different images in the cache afterwards.

    Raises:
        ValueError: The recipe names no cache, or an image is broken.
    """
    from llamafactory_hera.alignment.gather import rank
    from llamafactory_hera.selection.select import fill_teacher_cache

    from .inputs import selection_inputs
    from .recipe import read_recipe

    read = read_recipe(recipe, overrides)
    held = fill_teacher_cache(selection_inputs(read.config, *read.arguments), read.config)
    if rank() == 0:
        print(f"{read.config.teacher_cache}: features of {held} images")
    return held


def score_checkpoint(
    checkpoint: str | os.PathLike | None,
    recipe: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Scores the heads and layers of a checkpoint or adapter, as a selection does, and writes a file to be compared.

    The file names heads, or layers where the recipe aligns layers; both have the scores of both.

    Args:
        checkpoint: A model's folder or hub id, or an adapter's folder, which is loaded on top of the recipe's model;
            None scores the recipe's own model.
        recipe: Says dataset, template, teacher and settings.
        output: The file to write; default ``CHECKPOINT/hera/scores.json``, without a checkpoint
            ``output_dir/hera/scores.json``. A picture of the same name is put beside it.
        overrides: ``key=value`` s over the recipe; without a recipe they must say everything.

    Returns:
        The file.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    from llamafactory_hera.alignment.gather import rank
    from llamafactory_hera.files import RUN_FOLDER
    from llamafactory_hera.selection.pictures import show
    from llamafactory_hera.selection.select import select_targets

    from .inputs import selection_inputs
    from .recipe import named_output, read_recipe

    forced: dict[str, Any] = {}
    if checkpoint is not None and (Path(checkpoint) / "adapter_config.json").is_file():
        forced = {"adapter_name_or_path": str(checkpoint), "finetuning_type": "lora"}
    elif checkpoint is not None:
        forced = {"model_name_or_path": str(checkpoint), "adapter_name_or_path": None}
    read = read_recipe(recipe, overrides, **forced)
    if output is None:
        local = checkpoint is not None and Path(checkpoint).is_dir()
        folder = Path(checkpoint) if checkpoint is not None and local else named_output(read.values, "saves/selection")
        output = folder / RUN_FOLDER / "scores.json"
    path = Path(output)
    select_targets(selection_inputs(read.config, *read.arguments), read.config, path)
    if rank() == 0:
        show(path)
    return path


# -- the command line ------------------------------------------------------------------------------------------------


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the three subcommands."""
    parser = subparsers.add_parser("select", help="score every attention head and write the run's recipe")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="a recipe for llamafactory-cli train")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)
    parser.add_argument("--in-place", action="store_true", help="write the heads into the recipe itself, too")
    parser.add_argument(
        "--teacher-only", action="store_true", help="only fill hera_teacher_cache for the whole dataset"
    )
    parser.set_defaults(run=run_select)
    overrides_anywhere(parser)

    parser = subparsers.add_parser("score", help="score every attention head of a checkpoint or an adapter")
    parser.add_argument(
        "target", metavar="CHECKPOINT|RECIPE.yaml", help="a model, an adapter, or a recipe's own model"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)
    parser.add_argument("--recipe", metavar="RECIPE.yaml", help="says dataset, template, teacher and settings")
    parser.add_argument("--output", metavar="FILE.json", help="default: hera/scores.json in the checkpoint's folder")
    parser.set_defaults(run=run_score)
    overrides_anywhere(parser)

    parser = subparsers.add_parser("report", help="compare head scores before and after training")
    parser.add_argument("files", metavar="SCORES.json", nargs="+", help="score files, the one before training first")
    parser.add_argument("--names", metavar="NAME", nargs="+", default=(), help="a name for each file")
    parser.add_argument("--output", default="hera_report", help="OUTPUT.png and OUTPUT.md are written (%(default)s)")
    parser.set_defaults(run=run_report)


def overrides_anywhere(parser: argparse.ArgumentParser) -> None:
    """Lets ``key=value`` s stand before and behind a parser's options; they become its ``overrides``."""
    # argparse takes a list of positional arguments from one place only, not from before and behind an option
    parse = parser.parse_known_args

    def parse_known_args(args: Sequence[str], namespace: argparse.Namespace | None = None) -> tuple:
        parsed, rest = parse([arg for arg in args if not _OVERRIDE.fullmatch(arg)], namespace)
        parsed.overrides += [arg for arg in args if _OVERRIDE.fullmatch(arg)]
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def run_select(args: argparse.Namespace) -> int:
    """``llamafactory-hera select``."""
    quiet_host()
    status = relaunched()
    if status is not None:
        return status
    if args.teacher_only:
        fill_teacher(args.recipe, args.overrides)
    else:
        select(args.recipe, args.overrides, in_place=args.in_place)
    return 0


def run_score(args: argparse.Namespace) -> int:
    """``llamafactory-hera score``."""
    quiet_host()
    status = relaunched()
    if status is not None:
        return status
    is_recipe = Path(args.target).suffix in (".yaml", ".yml", ".json")
    recipe = args.target if is_recipe else args.recipe
    print(score_checkpoint(None if is_recipe else args.target, recipe, args.output, args.overrides))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """``llamafactory-hera report``."""
    from llamafactory_hera.selection.pictures import write_report

    for path in write_report(args.files, args.output, args.names):
        print(path)
    return 0


def quiet_host() -> None:
    """Keeps the host from printing every configuration that it loads: the table would be lost in them."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")


def relaunched() -> int | None:
    """Runs this command again under torchrun when several devices are there, or ``FORCE_TORCHRUN`` asks for it.

    The host's environment variables are read: ``FORCE_TORCHRUN``, ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``MASTER_ADDR`` and ``MASTER_PORT``.

    Returns:
        The exit status of the launch; None when this process should go on itself.
    """
    import torch

    environment = os.environ
    if "LOCAL_RANK" in environment:  # a launcher started this process
        return None
    n_devices = torch.accelerator.device_count()
    forced = environment.get("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1")
    if not forced and n_devices <= 1:
        return None
    options = [f"--nproc-per-node={environment.get('NPROC_PER_NODE', max(1, n_devices))}"]
    if "MASTER_ADDR" in environment or "NNODES" in environment:
        options += [
            f"--nnodes={environment.get('NNODES', 1)}",
            f"--node-rank={environment.get('NODE_RANK', 0)}",
            f"--master-addr={environment.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={environment.get('MASTER_PORT', 29500)}",
        ]
    else:
        options.append("--standalone")
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "llamafactory_hera.cli", *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode
