"""Calibration of a recipe's model: as a function, and as the subcommand ``calibrate``."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .selection import overrides_anywhere, quiet_host

if TYPE_CHECKING:
    from llamafactory_hera.calibration.samples import Control

# Keys under which the model is not what its checkpoint says -> why.
_REFUSED = {
    "use_unsloth": "Unsloth replaces the attention that is read",
    "use_kt": "KTransformers runs layers outside of PyTorch",
    "mixture_of_depths": "tokens skip layers",
}


def calibrate(
    recipe: str | os.PathLike | None, overrides: Sequence[str] = (), control: "Control | None" = None
) -> list[dict[str, Any]]:
    """Calibrates the model of a recipe and writes adapter, ``calibration.json`` and ``calibration.png``.

    Any recipe that trains the model will do: what concerns training is left out.

    Args:
        recipe: A recipe of the host; its model, dataset, template and ``rah_*`` keys are used, and ``output_dir``.
        overrides: ``key=value`` s over the recipe, for instance ``rah_delta=0.02``.
        control: Calibrate on corrupted data, too, into ``output_dir/control_<name>``: ``shuffled`` images, or
            ``blank`` ones.

    Returns:
        The content of ``calibration.json``; with a control that of the corrupted calibration behind it.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    from llamafactory_hera.calibration.run import calibrate_heads
    from llamafactory_hera.calibration.settings import RahConfig

    from .inputs import calibration_inputs
    from .recipe import host_arguments, named_output, read_values, without_training

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: calibration runs in one process on one device; start it without torchrun.")
    values, _ = read_values(recipe, overrides)
    ours = {key: value for key, value in values.items() if key.startswith(RahConfig.PREFIX)}
    config = RahConfig.from_keys(ours)
    # the host's parser does not know the keys
    values = {key: value for key, value in without_training(values).items() if key not in ours}
    if values.get("dataset") is None:
        raise ValueError("dataset: none is named; name one with images and text.")
    if values.get("template") is None:
        raise ValueError("template: none is named; name the one of the model, without which the host reads no image.")
    output_dir = named_output(values, "saves/calibration")
    # adapters are merged under LoRA alone; a fused loss kernel would leave no logits
    values |= {"stage": "sft", "finetuning_type": "lora", "enable_liger_kernel": False}
    arguments = host_arguments(values)
    _check_model(arguments[0])
    return calibrate_heads(calibration_inputs(config, *arguments), config, output_dir, control)


def _check_model(model_args: Any) -> None:
    from llamafactory.model import load_config

    from llamafactory_hera.heads.families import head_layout, is_multimodal

    from .recipe import model_folder

    for key, why in _REFUSED.items():
        value = getattr(model_args, key, None)
        if value:
            raise ValueError(f"{key}: {value} does not work with calibration: {why}; remove it.")
    name = model_args.model_name_or_path
    model_folder(model_args)
    config = load_config(model_args)
    if not is_multimodal(config):
        raise ValueError(
            f"model_name_or_path: {name} is a text-only model ({config.model_type}), and calibration looks at "
            "attention between text and image; give a multimodal model."
        )
    head_layout(config)
    quantised = model_args.quantization_bit is not None and f"quantization_bit: {model_args.quantization_bit}"
    if getattr(config, "quantization_config", None):
        quantised = f"model_name_or_path: {name} is quantised"
    if quantised:
        raise ValueError(
            f"{quantised}, and calibration compares and changes plain weights. Calibrate the base model without "
            "quantisation (the adapter then loads on the quantised one, too), or dequantise the checkpoint first."
        )


# -- the command line ------------------------------------------------------------------------------------------------


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="calibrate attention heads without training (RAH-LoRA) into a LoRA adapter",
        description=(
            "Finds attention heads that matter and hardly look across text and image, and moves their weights towards "
            "those of heads that do, within a bound on the model's output. The result is a PEFT adapter."
        ),
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="says model, dataset, template and rah_* keys")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys over the recipe's: rah_delta=0.02")
    parser.add_argument(
        "--control",
        choices=("shuffled", "blank"),
        help="calibrate on shuffled or blank images, too, and say what that did",
    )
    parser.set_defaults(run=run_calibrate)
    overrides_anywhere(parser)


def run_calibrate(args: argparse.Namespace) -> int:
    """``llamafactory-hera calibrate``."""
    quiet_host()
    # one device: the host refuses several of them in one process
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from llamafactory_hera.calibration.report import render_summary

    for report in calibrate(args.recipe, args.overrides, args.control):
        print(render_summary(report))
    return 0
