"""The subcommands that read a recipe of the host: select, score, fill a teacher cache, and calibrate."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import rank
from llamafactory_hera.files import CARD, RUN_FOLDER, write_text
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.targets import file_name
from llamafactory_hera.hub import is_adapter
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.integrations.model_card import add_scores
from llamafactory_hera.selection.report import show
from llamafactory_hera.selection.run_yaml import RecipeFile
from llamafactory_hera.selection.scores import SCORE_FILES
from llamafactory_hera.selection.select import fill_teacher_cache, select_targets

from .checks import UNREADABLE, check_folders, multimodal_config, refuse_keys, resolved_mode
from .inputs import UnlabeledSamples, selection_inputs
from .recipe import NOT_TRAINING, host_arguments, host_words, named_output, read_recipe, read_values

if TYPE_CHECKING:
    from llamafactory_hera.calibration.run import CalibrationInputs


@host_words()
def select(
    recipe: str | os.PathLike, overrides: Sequence[str] = (), in_place: bool = False, force: bool = False
) -> Targets:
    """Selects heads for a recipe and writes ``heads.json``, ``run.yaml`` and ``heads.png`` into ``output_dir/hera``.

    Args:
        recipe: The recipe of a training run.
        overrides: ``key=value`` pairs that replace keys of the recipe.
        in_place: Also writes the heads into the recipe.
        force: Replaces the heads of a run that has trained in the same folder.
    """
    file = RecipeFile.read(recipe)
    read = read_recipe(file, overrides)
    if read.config.granularity != "head":
        raise ValueError(
            f"hera_granularity: {recipe} aligns layers, but this command selects heads; to select layers, train with "
            "hera_layers: auto."
        )
    output_dir = named_output(read.values, "saves/selection")
    check_folders(str(output_dir), read.host)
    path = output_dir / RUN_FOLDER / file_name("head")
    if not force:
        _keep_trained(path, f"output_dir: {output_dir}", "give another folder, or replace the heads with --force")
    # prepared before hours of scoring, because the recipe may change meanwhile, or may not allow changes
    run = file.with_keys({**read.overrides, "stage": "hera", "hera_heads": str(path)})
    if in_place:
        file.set_in_place({"hera_heads": "L0H0"}, check_only=True)
    show_messages()
    config = resolved_mode(read.config, read.host)
    heads = select_targets(selection_inputs(config, read.host), config, path)
    if rank() == 0:
        show(path)
        written = path.with_name("run.yaml")
        command = f"llamafactory-cli train {written}"
        title = f"{' '.join(str(recipe).split())} with the selected heads: {' '.join(heads.names)}"
        write_text(written, f"# {title}\n# Train in the folder where the heads were selected:\n#   {command}\n\n{run}")
        if in_place:
            file.set_in_place({"hera_heads": str(heads)})
        print(*["wrote:", path, path.with_suffix(".png"), written, *([recipe] if in_place else [])], sep="\n  ")
        print(f"next:\n  {command}")
    return heads


@host_words()
def fill_teacher(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> int:
    """Fills the ``hera_teacher_cache`` of a recipe from its dataset, and returns the number of images in the cache."""
    read = read_recipe(recipe, overrides, hera_select_dataset=None)  # training reads the cache
    n_images = fill_teacher_cache(selection_inputs(read.config, read.host), read.config)
    if rank() == 0:
        print(f"{read.config.teacher_cache}: features of {n_images} images")
    return n_images


@host_words()
def score_checkpoint(
    checkpoint: str | os.PathLike | None,
    recipe: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Scores all heads of a checkpoint or an adapter, and returns the path of the file that it writes.

    Args:
        checkpoint: The folder or hub id of a model, or the folder of an adapter for the recipe's model; None scores
            the recipe's model.
        recipe: The recipe with the dataset, the template, the teacher and the settings.
        output: The file to write. The default is ``hera/scores.json`` in the checkpoint's folder. For the recipe's
            model, from which its run starts, the default is ``hera/before.json`` in ``output_dir``.
        overrides: ``key=value`` pairs that replace keys of the recipe.
    """
    forced: dict[str, Any] = {}
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and is_adapter(folder):
        forced = {"adapter_name_or_path": str(checkpoint), "finetuning_type": "lora"}
    elif folder is not None:
        forced = {"model_name_or_path": str(checkpoint), "adapter_name_or_path": None}
    read = read_recipe(recipe, overrides, **forced)
    show_messages()
    config = resolved_mode(read.config, read.host)
    if output is None and folder is not None and folder.is_dir():
        output = folder / RUN_FOLDER / SCORE_FILES[0]
    elif output is None:
        name = SCORE_FILES[1] if folder is None else f"{folder.name}.json"
        output = named_output(read.values, "saves/selection") / RUN_FOLDER / name
    path = Path(output)
    if path.name in (file_name("head"), file_name("layer")):
        _keep_trained(path, f"--output: {path.parent}", "give another name")
    select_targets(selection_inputs(config, read.host), config, path)
    if rank() == 0:
        compared = show(path)
        print("wrote:", path, path.with_suffix(".png"), sep="\n  ")
        if folder and compared:
            add_scores(folder, compared)
            if len(compared.files) > 1:
                print(f"next:\n  llamafactory-hera report {folder}")
    return path


def _keep_trained(path: Path, where: str, remedy: str) -> None:
    """Refuses to replace the file with the heads or layers of a run that has finished or can be resumed."""
    trained = next(filter(Path.exists, map(path.with_name, (CARD, "run.json"))), None)
    if trained is not None:
        raise ValueError(f"{where} contains a run that trained ({trained}) with the heads in {path.name}; {remedy}.")


@host_words()
def read_calibration(
    recipe: str | os.PathLike | None, overrides: Sequence[str] = ()
) -> "tuple[CalibrationInputs, RahConfig, Path]":
    """Reads the arguments of ``calibrate_heads`` from a recipe: model and data, ``rah_*`` keys, and output folder."""
    from llamafactory_hera.calibration.run import CalibrationInputs  # only calibration needs its modules

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: calibration runs in one process; start it without torchrun.")
    values, _ = read_values(recipe, overrides)
    keys = {key: value for key, value in values.items() if key.startswith(RahConfig.PREFIX)}
    config = RahConfig.from_keys(keys)
    # the host does not know calibration's keys, and calibration does not read HeRA's keys
    values = {key: value for key, value in values.items() if not key.startswith((RahConfig.PREFIX, HeraConfig.PREFIX))}
    output_dir = named_output(values, "saves/calibration")
    # The host merges adapters only for LoRA. A fused loss kernel would compute no logits.
    values |= NOT_TRAINING | {"stage": "sft", "finetuning_type": "lora", "enable_liger_kernel": False}
    host = host_arguments(values)
    check_folders(str(output_dir), host)
    refuse_keys(host, UNREADABLE, "calibration")
    multimodal_config(host.model)
    rows, adapters = UnlabeledSamples(host, config.samples, config.text), host.model.adapter_name_or_path
    return CalibrationInputs(adapter_names=tuple(adapters or ()), **rows.common()), config, output_dir
