"""HeRA in ms-swift's ``swift sft`` and ``swift pt``: a plugin that reads ``HERA_*`` environment variables.

``external_plugins`` names this file, or a file with the line ``import llamafactory_hera.integrations.ms_swift``. The
import registers the trainer and its arguments in ms-swift's factory, and changes nothing else.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml
from swift.dataset import LazyLLMDataset
from swift.template import Template, TemplateInputs
from swift.template.vision_utils import load_file
from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerFactory

# Absolute imports, because ms-swift may load this file by its path, outside the package.
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.transformers import HeraTrainerMixin
from llamafactory_hera.teachers.images import ImageLike

_MODULE = "llamafactory_hera.integrations.ms_swift"
_FILE = "HERA_CONFIG"
_OTHERS = (_FILE, "HERA_DISABLE", "HERA_DEBUG")  # variables that are not keys
_IMAGES = "hera_images"  # the entry for the images in an encoded row

_ONE_ROW = "it puts several samples into one row, but HeRA compares rows"
# Argument -> a function that returns whether HeRA refuses a value, and the reason for refusing it.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "packing": (bool, _ONE_ROW),
    "padding_free": (bool, _ONE_ROW),
    "sequence_parallel_size": (lambda size: size > 1, "each process needs whole samples and heads"),
    "streaming": (bool, "a stream is encoded without its images"),
    "truncation_strategy": (lambda name: name == "split", "it splits a sample into several rows"),
    "tuner_backend": (lambda name: name == "unsloth", "it replaces the attention that HeRA reads heads from"),
}


def read_keys(environment: Mapping[str, str] = os.environ) -> HeraConfig:
    """Reads the keys from the YAML file in ``HERA_CONFIG``, and from ``HERA_*`` variables, which take precedence.

    Raises:
        ValueError: The file cannot be read, or a name or a value in the file or the variables is wrong.
    """
    keys: dict[str, Any] = {}
    if path := environment.get(_FILE):
        try:
            keys = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{_FILE}: {path} cannot be read ({error}); give a YAML file of hera_* keys.") from error
        if not isinstance(keys, dict) or not all(str(key).startswith(HeraConfig.PREFIX) for key in keys):
            raise ValueError(f"{_FILE}: {path} must contain only lines such as hera_weight: 0.1; remove all others.")
    variables = {name.lower(): value for name, value in environment.items() if name not in _OTHERS}
    return HeraConfig.from_keys({**keys, **{key: v for key, v in variables.items() if key.startswith("hera_")}})


@dataclass
class HeraArguments(Seq2SeqTrainingArguments):
    """ms-swift's training arguments, checked before the model is loaded.

    ms-swift fills each field from its argument of the same name.
    """

    packing: bool = False
    padding_free: bool = False
    sequence_parallel_size: int = 1
    streaming: bool = False
    truncation_strategy: str | None = None

    def __post_init__(self) -> None:
        read_keys()
        for name, (refuses, why) in _REFUSED.items():
            value = getattr(self, name)
            if refuses(value):
                raise ValueError(f"{name}: {value} does not work with HeRA ({why}); remove the argument.")
        super().__post_init__()


def refuse(rlhf_type: str | None = None, task_type: str | None = None) -> None:
    """Replaces the training arguments of other tasks, because their trainers would ignore HeRA."""
    argument = f"rlhf_type: {rlhf_type}" if rlhf_type else f"task_type: {task_type}"
    raise ValueError(f"{argument} does not work with HeRA, which is for supervised fine-tuning; remove the plugin.")


class HeraSwiftTrainer(HeraTrainerMixin, Seq2SeqTrainer):
    """ms-swift's trainer with HeRA, whose keys come from the environment."""

    in_words = str

    def __init__(self, *args: Any, train_dataset: Any, template: Template, **kwargs: Any) -> None:
        if not isinstance(train_dataset, LazyLLMDataset):
            kind = type(train_dataset).__name__
            raise ValueError(f"lazy_tokenize: a {kind} does not keep the images of its rows; set it to true.")
        train_dataset.encode_func = partial(_encode, train_dataset.encode_func)
        kwargs |= {"train_dataset": train_dataset, "template": template}
        super().__init__(*args, hera=read_keys(), images_of=itemgetter(_IMAGES), **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and writes a model card (ms-swift writes none) into the last checkpoint, which is the model."""
        result = super().train(*args, **kwargs)
        output_dir = self.args.output_dir
        self.args.output_dir = getattr(self.state, "last_model_checkpoint", None) or output_dir
        self.write_hera_card()
        self.args.output_dir = output_dir
        return result

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # HeRA needs all labels, but ms-swift keeps only the labels of the answers (use_logits_to_keep).
        if "labels" in inputs and "hera_source" in inputs:
            inputs["hera_labels"] = inputs["labels"]
        inputs = super()._prepare_inputs(inputs)
        if inputs.get("compute_loss_func") is None:  # gradient caching passes all inputs to the model
            inputs.pop("compute_loss_func", None)
        return inputs


def _encode(encode: Callable[..., dict[str, Any]], row: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Encodes a row of the dataset, and keeps its images for the teacher."""
    sample = TemplateInputs.from_dict(row).chosen
    Template._replace_image_tags(sample)
    return {**encode(row, **kwargs), _IMAGES: [_image(image) for image in sample.images]}


def _image(image: Any) -> ImageLike:
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if isinstance(image, str) and not image.startswith("http"):
        image = load_file(image).getvalue()  # supports ROOT_IMAGE_DIR and base64
    return image


def register() -> None:
    """Registers the trainer for supervised fine-tuning, and refuses all other tasks."""
    if "swift.megatron" in sys.modules:
        raise ValueError("megatron: its trainers are not transformers' Trainer, so HeRA does not work; use swift sft.")
    for name in TrainerFactory.TRAINING_ARGS_MAPPING:
        TrainerFactory.TRAINING_ARGS_MAPPING[name] = (
            f"{_MODULE}.{'HeraArguments' if name == 'causal_lm' else 'refuse'}"
        )
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{_MODULE}.HeraSwiftTrainer"
    # ms-swift adds a plugin's folder to sys.path, but modules in this folder have the names of the hosts.
    sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]


register()
