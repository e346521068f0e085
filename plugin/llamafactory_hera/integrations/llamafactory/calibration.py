"""Calibration from a recipe of the host."""

import os
from collections.abc import Sequence
from pathlib import Path

from llamafactory_hera.calibration.run import CalibrationInputs
from llamafactory_hera.calibration.settings import RahConfig, Text
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.tokens import IGNORE_INDEX
from llamafactory_hera.selection.samples import Features
from llamafactory_hera.teachers.images import ImageLike

from .checks import UNREADABLE, check_folders, multimodal_config, refuse_keys
from .inputs import Samples, has_answer
from .recipe import NOT_TRAINING, HostArguments, host_arguments, host_words, named_output, read_values


@host_words()
def read_calibration(
    recipe: str | os.PathLike | None, overrides: Sequence[str] = ()
) -> tuple[CalibrationInputs, RahConfig, Path]:
    """Reads a recipe, with overrides, as the arguments of ``calibrate_heads``: model and data, keys, output folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("WORLD_SIZE: calibration runs in one process; start it without torchrun.")
    values, _ = read_values(recipe, overrides)
    keys = {key: value for key, value in values.items() if key.startswith(RahConfig.PREFIX)}
    config = RahConfig.from_keys(keys)
    # the host does not know the keys of calibration, and calibration does not read those of HeRA
    values = {key: value for key, value in values.items() if not key.startswith((RahConfig.PREFIX, HeraConfig.PREFIX))}
    output_dir = named_output(values, "saves/calibration")
    # The host merges adapters only for LoRA. A fused loss kernel would compute no logits.
    values |= NOT_TRAINING | {"stage": "sft", "finetuning_type": "lora", "enable_liger_kernel": False}
    host = host_arguments(values)
    check_folders(str(output_dir), host)
    refuse_keys(host, UNREADABLE, "calibration")
    multimodal_config(host.model)
    rows, adapters = _UnlabeledSamples(host, config.samples, config.text), host.model.adapter_name_or_path
    return CalibrationInputs(adapter_names=tuple(adapters or ()), **rows.common()), config, output_dir


class _UnlabeledSamples(Samples):
    """Samples without labels: complete conversations, or only their prompts. ``encode`` can replace images."""

    def __init__(self, host: HostArguments, n_samples: int, text: Text) -> None:
        super().__init__(host, n_samples)
        self._text = text
        self._prompt_processor = self.make_processor(do_generate=True)

    def encode(self, row: int, images: Sequence[ImageLike] | None = None) -> Features | None:
        example = dict(self.rows[row])
        if images is not None:
            example["_images"] = list(images)
        complete = self._text == "conversation" and has_answer(example)
        features = self.encode_with(example, self.processor if complete else self._prompt_processor)
        if features is None:
            return None
        self.check(row, features)
        return features | {"labels": [IGNORE_INDEX] * len(features["input_ids"])}
