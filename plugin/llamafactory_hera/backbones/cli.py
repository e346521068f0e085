"""The commands ``build`` and ``recipes``."""

import argparse
from typing import Any

from .table import VISION_MODEL


def register(commands: Any) -> None:
    """Adds the commands to the subparsers of ``llamafactory-hera``."""
    build = commands.add_parser(
        "build",
        help="assemble a LLaVA-style model from a language model and a vision encoder",
        description=(
            "Makes a LLaVA-style model with a random two-layer projector, ready for stage 1. Weights are copied as "
            "they are; the folder gets its name when the model is complete."
        ),
    )
    build.add_argument("--language-model", required=True, help="folder or hub id, for instance Qwen/Qwen3-8B")
    build.add_argument(
        "--vision-model",
        default=VISION_MODEL,
        help="folder or hub id of a CLIP, SigLIP, SigLIP2 or DINOv2 model (default: %(default)s)",
    )
    build.add_argument("--output", required=True, help="folder to make")
    build.add_argument("--seed", type=int, default=0, help="seed of the projector (default: %(default)s)")
    build.add_argument(
        "--shard-gib", type=float, default=4.0, help="largest weight file in GiB (default: %(default)s)"
    )
    build.set_defaults(run=_build)

    recipes = commands.add_parser(
        "recipes",
        help="list the shipped recipes, or copy them into a folder",
        description="Lists the shipped recipes with what each does; with --copy-to they are copied, data and all.",
    )
    recipes.add_argument("name", nargs="*", help="show only recipes whose name contains one of these")
    recipes.add_argument("--copy-to", metavar="FOLDER", help="copy all of them, with dataset_info.json and deepspeed/")
    recipes.set_defaults(run=_recipes)


def _build(arguments: argparse.Namespace) -> int:
    from .build import build_backbone

    built = build_backbone(
        arguments.language_model,
        arguments.vision_model,
        arguments.output,
        seed=arguments.seed,
        shard_gib=arguments.shard_gib,
        report=lambda line: print(line, flush=True),
    )
    print(f"{built.folder}: {built.n_parameters:,} parameters")
    print(f"<image> is token {built.image_token_id}; an image takes {built.image_tokens} tokens of cutoff_len")
    print(f"template: llava_plain in stage 1, {built.template or 'none that is known here'} in stage 2")
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from .shipped import copy_recipes, shipped_recipes

    if arguments.copy_to is not None:
        print(f"{len(copy_recipes(arguments.copy_to))} recipes copied to {arguments.copy_to}")
        return 0
    found = shipped_recipes()
    chosen = {n: t for n, t in found.items() if not arguments.name or any(part in n for part in arguments.name)}
    if not chosen:
        raise ValueError(
            f"recipes: no recipe's name contains {' or '.join(arguments.name)}; there are {', '.join(found)}."
        )
    width = max(map(len, chosen))
    print("\n".join(f"{name:<{width}}  {title}" for name, title in chosen.items()))
    return 0
