"""A recipe as calibration reads it: its ``rah_*`` keys, and model and data as plain objects."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamafactory_hera.calibration.material import Material
from llamafactory_hera.calibration.settings import PREFIX, RahSettings, Text
from llamafactory_hera.heads.families import head_layout, is_multimodal
from llamafactory_hera.heads.pooling import IGNORE_INDEX
from llamafactory_hera.selection.source import Features
from llamafactory_hera.teachers.images import ImageLike

from .model_files import model_folder
from .recipe import HostSource, aligned_dataset, has_answer, host_collator
from .recipe_arguments import host_arguments, named_output
from .recipe_values import read_values, without_training

# Keys under which the model is not what its checkpoint says -> why.
_REFUSED = {
    "use_unsloth": "Unsloth replaces the attention that is read",
    "use_kt": "KTransformers runs layers outside of PyTorch",
    "mixture_of_depths": "tokens skip layers",
}


@dataclass(frozen=True)
class CalibrationRecipe:
    """A recipe with its overrides, for a calibration.

    Attributes:
        settings: Its ``rah_*`` keys.
        material: Model and data, the model not loaded yet.
        output_dir: Where the result goes.
    """

    settings: RahSettings
    material: Material
    output_dir: Path


def read_calibration(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> CalibrationRecipe:
    """Reads a recipe with the host's parser, which does not see the ``rah_*`` keys.

    Any recipe that trains the model will do: what concerns training is left out.

    Args:
        path: A YAML or JSON file; None when the overrides say everything.
        overrides: ``key=value`` s, as the host takes them.

    Raises:
        ValueError: The file cannot be read, a key or value is refused, or the model cannot be calibrated.
    """
    _one_process()
    values, _ = read_values(path, overrides)
    settings = RahSettings.from_values({key: value for key, value in values.items() if key.startswith(PREFIX)})
    values = {key: value for key, value in without_training(values).items() if not key.startswith(PREFIX)}
    if values.get("dataset") is None:
        raise ValueError("dataset: none is named; name one with images and text.")
    if values.get("template") is None:
        raise ValueError("template: none is named; name the one of the model, without which the host reads no image.")
    output_dir = named_output(values, "saves/calibration")
    # adapters are merged under LoRA alone; a fused loss kernel would leave no logits
    values |= {"stage": "sft", "finetuning_type": "lora", "enable_liger_kernel": False}
    model_args, data_args, training_args, finetuning_args = host_arguments(values)
    _check_model(model_args)
    material = _material(model_args, data_args, training_args, finetuning_args, settings)
    return CalibrationRecipe(settings, material, output_dir)


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: calibration runs in one process on one device; start it without torchrun.")


def _check_model(model_args: Any) -> None:
    from llamafactory.model import load_config

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


def _material(
    model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any, settings: RahSettings
) -> Material:
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_model, load_tokenizer

    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    aligned = aligned_dataset(model_args, data_args, training_args, settings.samples)

    def whole_model() -> nn.Module:
        return load_model(tokenizer, model_args, finetuning_args, is_trainable=False)

    return Material(
        source=CalibrationSource(aligned, template, data_args, tokenizer_module, settings.text),
        load_model=whole_model,
        collator=lambda model: host_collator(model, template, model_args, data_args, tokenizer_module),
        model_name=model_args.model_name_or_path,
        dataset_name=", ".join(data_args.dataset),
        adapter_names=tuple(model_args.adapter_name_or_path or ()),
        autocast=torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None,
        num_workers=training_args.dataloader_num_workers,
    )


class CalibrationSource(HostSource):
    """Samples as the model would see them, with other images if asked for, and without labels.

    Args:
        aligned: The dataset in the host's common form.
        template: The host's template.
        data_args: The host's.
        tokenizer_module: Tokenizer and processor.
        text: The whole conversation, or the prompt before the last answer; a sample without an answer is its prompt.
    """

    def __init__(
        self, aligned: Any, template: Any, data_args: Any, tokenizer_module: dict[str, Any], text: Text
    ) -> None:
        from llamafactory.data.loader import _get_dataset_processor

        super().__init__(aligned, template, data_args, tokenizer_module)
        self._text = text
        self._prompt_processor = _get_dataset_processor(
            data_args, "sft", template, **tokenizer_module, do_generate=True
        )

    def encode(self, row: int, images: Sequence[ImageLike] | None = None) -> Features | None:
        example = dict(self._aligned[row])
        if images is not None:
            example["_images"] = list(images)
        whole = self._text == "conversation" and has_answer(example)
        features = self._encode(example, self._processor if whole else self._prompt_processor)
        if features is None:
            return None
        self._check(row, features)
        return features | {"labels": [IGNORE_INDEX] * len(features["input_ids"])}
