"""What the subcommands do with a recipe of the host, as functions: select, score, fill a cache, read a calibration."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamafactory_hera.calibration.run import CalibrationInputs
from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.distributed import rank
from llamafactory_hera.files import RUN_FOLDER, write_text
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.families import head_layout
from llamafactory_hera.heads.targets import file_name
from llamafactory_hera.integrations.model_card import index_scores
from llamafactory_hera.objectives import TokenObjective
from llamafactory_hera.selection.report import show
from llamafactory_hera.selection.run_yaml import RecipeFile
from llamafactory_hera.selection.select import fill_teacher_cache, select_targets

from .checks import UNREADABLE, check_folders, multimodal_config, refuse_keys
from .inputs import calibration_inputs, selection_inputs
from .recipe import NOT_TRAINING, host_arguments, model_folder, named_output, read_recipe, read_values


def select(
    recipe: str | os.PathLike, overrides: Sequence[str] = (), in_place: bool = False, force: bool = False
) -> Targets:
    """Selects heads for a recipe and writes ``output_dir/hera/`` : ``heads.json``, ``run.yaml`` and ``heads.png``.

    ``overrides`` are ``key=value`` s over the recipe; ``in_place`` writes the heads into the recipe itself, too, and
    ``force`` replaces those that a run in the same folder has trained.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    file = RecipeFile.read(recipe)
    read = read_recipe(file, overrides)
    if read.config.granularity != "head":
        raise ValueError(
            f"hera_granularity: {recipe} aligns layers, and heads are selected here; hera_layers: auto selects layers "
            "before training."
        )
    output_dir = named_output(read.values, "saves/selection")
    check_folders(str(output_dir), read.host, read.config)
    path = output_dir / RUN_FOLDER / file_name("head")
    if not force:
        _keep_trained(path, f"output_dir: {output_dir}", "give another folder, or --force to replace it")
    # before hours of scoring: the recipe may change meanwhile, and what cannot be written is refused
    run = file.with_keys({**read.overrides, "stage": "hera", "hera_heads": str(path)})
    if in_place:
        file.set_in_place({"hera_heads": "L0H0"}, check_only=True)
    heads = select_targets(selection_inputs(read.config, read.host), read.config, path)
    if rank() == 0:
        show(path)
        written = path.with_name("run.yaml")
        command = f"llamafactory-cli train {written}"
        title = f"{' '.join(str(recipe).split())} with the selected heads: {' '.join(heads.names)}"
        write_text(written, f"# {title}\n# Run it in the same folder:\n#   {command}\n\n{run}")
        if in_place:
            file.set_in_place({"hera_heads": str(heads)})
        print(*["wrote:", path, path.with_suffix(".png"), written, *([recipe] if in_place else [])], sep="\n  ")
        print(f"next:\n  {command}")
    return heads


def fill_teacher(recipe: str | os.PathLike, overrides: Sequence[str] = ()) -> int:
    """Fills a recipe's ``hera_teacher_cache`` with its whole dataset; returns how many images it holds then."""
    read = read_recipe(recipe, overrides, hera_select_dataset=None)  # training reads the cache
    if issubclass(read.config.objective_class(), TokenObjective):
        raise ValueError(
            f"hera_teacher_cache: hera_objective: {read.config.objective} keeps features of tokens there, which "
            "training fills as it goes; leave --teacher-only out."
        )
    held = fill_teacher_cache(selection_inputs(read.config, read.host), read.config)
    if rank() == 0:
        print(f"{read.config.teacher_cache}: features of {held} images")
    return held


def score_checkpoint(
    checkpoint: str | os.PathLike | None,
    recipe: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Scores a checkpoint or adapter as a selection does, writes a file to be compared, and returns its path.

    The model card of a run gets the MKNN of the heads or layers that it aligned.

    Args:
        checkpoint: A model's folder or hub id, or an adapter's folder for the recipe's model; None is that model.
        recipe: Dataset, template, teacher and settings.
        output: The file to write, with a picture beside it; default ``hera/scores.json`` in CHECKPOINT or output_dir.
        overrides: ``key=value`` s that go over the recipe.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    forced: dict[str, Any] = {}
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and (folder / "adapter_config.json").is_file():
        forced = {"adapter_name_or_path": str(checkpoint), "finetuning_type": "lora"}
    elif folder is not None:
        forced = {"model_name_or_path": str(checkpoint), "adapter_name_or_path": None}
    read = read_recipe(recipe, overrides, **forced)
    if output is None:
        if folder is None or not folder.is_dir():
            folder = named_output(read.values, "saves/selection")
        output = folder / RUN_FOLDER / "scores.json"
    path = Path(output)
    if path.name in (file_name("head"), file_name("layer")):
        _keep_trained(path, f"--output: {path.parent}", "give another name")
    elif path.is_file() and not _holds_scores(path):
        raise ValueError(f"--output: {path} is there and holds no scores, and would be lost; give another name.")
    select_targets(selection_inputs(read.config, read.host), read.config, path)
    if rank() == 0:
        show(path)
        if checkpoint is not None:
            index_scores(Path(checkpoint), path)
    return path


def read_calibration(
    recipe: str | os.PathLike | None, overrides: Sequence[str] = ()
) -> tuple[CalibrationInputs, RahConfig, Path]:
    """Reads a recipe to calibrate, with ``key=value`` overrides, as the arguments of ``calibrate_heads``.

    Returns:
        The model and the dataset, the ``rah_*`` keys, and the output folder.

    Raises:
        ValueError: An input is bad; names the key, the value and the remedy.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: calibration runs in one process on one device; start it without torchrun.")
    values, _ = read_values(recipe, overrides)
    ours = {key: value for key, value in values.items() if key.startswith(RahConfig.PREFIX)}
    config = RahConfig.from_keys(ours)
    # the host's parser does not know the keys
    values = {key: value for key, value in values.items() if key not in ours}
    if values.get("template") is None:
        raise ValueError("template: none is named; name the one of the model, without which the host reads no image.")
    output_dir = named_output(values, "saves/calibration")
    # adapters are merged under LoRA alone; a fused loss kernel would leave no logits
    values |= NOT_TRAINING | {"stage": "sft", "finetuning_type": "lora", "enable_liger_kernel": False}
    host = host_arguments(values)
    check_folders(str(output_dir), host)
    _check_calibrated(host.model)
    return calibration_inputs(config, host), config, output_dir


def _keep_trained(path: Path, where: str, remedy: str) -> None:
    trained = next(filter(Path.exists, map(path.with_name, ("card.json", "run.json"))), None)
    if trained is not None:
        raise ValueError(
            f"{where} holds a run that has trained ({trained}), whose {path.name} says what it aligned; {remedy}."
        )


def _holds_scores(path: Path) -> bool:
    with suppress(ValueError):
        return bool(Targets.load(path).provenance)
    return False


def _check_calibrated(model_args: Any) -> None:
    refuse_keys(model_args, UNREADABLE, "calibration")
    model_folder(model_args)
    config = multimodal_config(model_args, "calibration looks at attention between text and image")
    head_layout(config)
    quantized = model_args.quantization_bit is not None and f"quantization_bit: {model_args.quantization_bit}"
    if getattr(config, "quantization_config", None):
        quantized = f"model_name_or_path: {model_args.model_name_or_path} is quantized"
    if quantized:
        raise ValueError(
            f"{quantized}, and calibration compares and changes plain weights. Calibrate the base model without "
            "quantization (the adapter then loads on the quantized one, too), or dequantize the checkpoint first."
        )
