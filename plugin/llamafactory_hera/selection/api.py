"""Selection, scoring and reports as functions of a recipe; the command line calls these."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..heads.head_set import HeadSet

RUN_RECIPE = "run.yaml"


def select(recipe: str | os.PathLike, overrides: Sequence[str] = (), in_place: bool = False) -> "HeadSet":
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
    from ..alignment.gather import rank
    from ..integrations.llamafactory.recipe import read_recipe
    from .recipe_file import set_heads_in_place, write_run_recipe
    from .run import FOLDER, HEADS_FILE, select_heads
    from .settings import SelectSettings

    read = read_recipe(recipe, overrides)
    if read.granularity != "head":
        raise ValueError(
            f"hera_granularity: {recipe} aligns layers, and heads are selected here; hera_layers: auto selects layers "
            "before training."
        )
    target = read.output_dir() / FOLDER / HEADS_FILE
    heads = select_heads(read.material(), SelectSettings.from_arguments(read.finetuning_args), target)
    if rank() == 0:
        from .present import present

        present(target)
        write_run_recipe(read.path, read.overrides, heads, target, target.with_name(RUN_RECIPE))
        if in_place:
            set_heads_in_place(read.path, heads)
    return heads


def fill_teacher(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> int:
    """Computes the teacher's features of a recipe's whole dataset into its ``hera_teacher_cache``.

    Returns:
        Number of different images in the cache afterwards.

    Raises:
        ValueError: The recipe names no cache, or an image is broken.
    """
    from ..alignment.gather import rank
    from ..integrations.llamafactory.recipe import read_recipe
    from .settings import SelectSettings
    from .teacher import fill_teacher_cache

    read = read_recipe(recipe, overrides)
    held = fill_teacher_cache(read.material(), SelectSettings.from_arguments(read.finetuning_args))
    if rank() == 0:
        print(f"{read.finetuning_args.hera_teacher_cache}: features of {held} images")
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
        checkpoint: A model's folder or hub id, or an adapter's folder, which is loaded upon the recipe's model; None
            scores the recipe's own model.
        recipe: Says dataset, template, teacher and settings.
        output: The file to write; default ``CHECKPOINT/hera/scores.json``, without a checkpoint
            ``output_dir/hera/scores.json``. A picture of the same name is put beside it.
        overrides: ``key=value`` s over the recipe; without a recipe they must say everything.

    Returns:
        The file.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    from ..alignment.gather import rank
    from ..integrations.llamafactory.recipe import read_recipe
    from .run import FOLDER, select_heads, select_layers
    from .settings import SelectSettings

    forced: dict[str, Any] = {}
    if checkpoint is not None and (Path(checkpoint) / "adapter_config.json").is_file():
        forced = {"adapter_name_or_path": str(checkpoint), "finetuning_type": "lora"}
    elif checkpoint is not None:
        forced = {"model_name_or_path": str(checkpoint), "adapter_name_or_path": None}
    read = read_recipe(recipe, overrides, **forced)
    if output is None:
        local = checkpoint is not None and Path(checkpoint).is_dir()
        output = (Path(checkpoint) if local else read.output_dir()) / FOLDER / "scores.json"
    target = Path(output)
    score = select_layers if read.granularity == "layer" else select_heads
    score(read.material(), SelectSettings.from_arguments(read.finetuning_args), target)
    if rank() == 0:
        from .present import present

        present(target)
    return target
