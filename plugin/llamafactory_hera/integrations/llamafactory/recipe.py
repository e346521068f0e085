"""A recipe as the host reads it, and model, teacher and data of it as the plain objects that selection works with."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamafactory_hera.selection.source import Collate, Features, Source
from llamafactory_hera.selection.captions import CaptionSource, collate_captions
from llamafactory_hera.selection.material import Material
from llamafactory_hera.teachers.encoder import VisionTeacher, whole_model_on_every_rank
from llamafactory_hera.teachers.images import ImageLike, load_image

from .dataset_checks import N_CHECKED, check_image_tokens
from .model_files import model_folder
from .recipe_arguments import host_arguments, named_output
from .recipe_values import read_values, without_training

# Keys under which every head is scored, whatever the recipe trains.
_SCORED = {
    "stage": "hera",
    "hera_heads": "auto",
    "hera_granularity": "head",
    "hera_layers": None,
    "hera_objective": "contrastive",
}
# Rows of a stream that are read for each sample to draw.
_STREAM_ROWS = 4


@dataclass(frozen=True)
class Recipe:
    """A recipe with its overrides.

    Attributes:
        path: The file, if there is one.
        overrides: Keys given beside it, with their values.
        values: All keys with their values, set to score instead of train.
        model_args: What the host's parser made of them.
        data_args: See ``model_args``.
        training_args: See ``model_args``.
        finetuning_args: See ``model_args``; holds the ``hera_*`` keys.
        granularity: ``head`` or ``layer``: what the recipe aligns.
    """

    path: Path | None
    overrides: dict[str, Any]
    values: dict[str, Any]
    model_args: Any
    data_args: Any
    training_args: Any
    finetuning_args: Any
    granularity: str = "head"

    def output_dir(self) -> Path:
        """Where the result goes.

        Raises:
            ValueError: The recipe does not say.
        """
        return named_output(self.values, "saves/selection")

    def material(self) -> Material:
        """Model, teacher and data, none of them loaded yet except for the dataset's index."""
        return material(self.model_args, self.data_args, self.training_args, self.finetuning_args)


def read_recipe(path: str | os.PathLike | None, overrides: Sequence[str] = (), **forced: Any) -> Recipe:
    """Reads a recipe with the host's parser, for scoring.

    Args:
        path: A YAML or JSON file as for ``llamafactory-cli train``; None when the overrides say everything.
        overrides: ``key=value`` s, as the host takes them.
        forced: Further keys, over both.

    Raises:
        ValueError: The file cannot be read, or a key or value is refused by the host.
    """
    values, changes = read_values(path, overrides)
    granularity = values.get("hera_granularity") or "head"
    # what the recipe aligns, and how, is nothing to a score
    values = without_training(values) | _SCORED | forced
    if values.get("dataset") is None:
        raise ValueError("dataset: none is named; name one with image-caption pairs.")
    return Recipe(Path(path) if path else None, changes, values, *host_arguments(values), granularity)


def material(model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any) -> Material:
    """What selection needs of a run's arguments.

    Raises:
        ValueError: The model's files cannot be found, or the dataset is refused by the host.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_model, load_tokenizer

    folder = model_folder(model_args)
    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    aligned = aligned_dataset(model_args, data_args, training_args, finetuning_args.hera_select_samples)

    def whole_model() -> nn.Module:
        with whole_model_on_every_rank():
            return load_model(tokenizer, model_args, finetuning_args, is_trainable=False)

    source: Source
    if finetuning_args.hera_select_mode == "llm":
        source = CaptionSource(
            len(aligned),
            images=lambda row: aligned[row]["_images"] or [],
            caption=lambda row: _caption(aligned[row]),
            tokenizer=tokenizer,
            max_length=data_args.cutoff_len,
        )
        collate = partial(collate_captions, pad_token_id=tokenizer.pad_token_id or 0)
    else:
        source = HostSource(aligned, template, data_args, tokenizer_module)
        collate = None

    def collator(model: nn.Module) -> Collate:
        return collate or host_collator(model, template, model_args, data_args, tokenizer_module)

    half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    on_accelerator = training_args.device.type != "cpu"
    teacher_dtype = half if on_accelerator and half is not None else torch.float32  # as in training
    return Material(
        source=source,
        load_model=whole_model,
        collator=collator,
        load_teacher=partial(
            VisionTeacher.from_pretrained, finetuning_args.hera_teacher, training_args.device, teacher_dtype
        ),
        model_name=model_args.model_name_or_path,
        model_folder=folder,
        adapter_folders=[Path(folder) for folder in model_args.adapter_name_or_path or []],
        teacher_name=finetuning_args.hera_teacher,
        dataset_name=", ".join(data_args.dataset),
        teacher_cache=finetuning_args.hera_teacher_cache,
        autocast=half,
        num_workers=training_args.dataloader_num_workers,
    )


def aligned_dataset(model_args: Any, data_args: Any, training_args: Any, n_samples: int) -> Any:
    """The training part of a run's dataset in the host's common form; of a stream, rows enough for ``n_samples``."""
    from llamafactory.data.data_utils import split_dataset
    from llamafactory.data.loader import _get_merged_dataset

    with training_args.main_process_first(desc="load dataset", local=not data_args.data_shared_file_system):
        merged = _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, "sft")
        train = split_dataset(merged, None, data_args, seed=training_args.seed)[0]["train"]
    # a stream has no rows to draw from: its beginning, which the host has shuffled, stands for it
    return list(train.take(_STREAM_ROWS * n_samples)) if data_args.streaming else train


def _caption(example: dict[str, Any]) -> str:
    from llamafactory.data.data_utils import Role
    from llamafactory.extras.constants import IMAGE_PLACEHOLDER

    messages = [*example["_prompt"], *example["_response"][:1]]
    spoken = [message["content"] for message in messages if message["role"] == Role.ASSISTANT]
    return "\n".join(spoken).replace(IMAGE_PLACEHOLDER, "")


def has_answer(example: dict[str, Any]) -> bool:
    """Whether the assistant says anything in the last turn of a sample."""
    return any(response["content"].strip() for response in example["_response"])


class HostSource:
    """Samples as training sees them."""

    def __init__(self, aligned: Any, template: Any, data_args: Any, tokenizer_module: dict[str, Any]) -> None:
        from llamafactory.data.loader import _get_dataset_processor

        self._aligned = aligned
        self._check = partial(check_image_tokens, template=template, data_args=data_args, **tokenizer_module)
        self._n_encoded = 0
        self._processor = _get_dataset_processor(data_args, "sft", template, **tokenizer_module)

    def __len__(self) -> int:
        return len(self._aligned)

    def images(self, row: int) -> list[ImageLike]:
        return self._aligned[row]["_images"] or []

    def encode(self, row: int) -> Features | None:
        example = self._aligned[row]
        features = self._encode(example, self._processor) if has_answer(example) else None
        if features is not None:
            if self._n_encoded < N_CHECKED and features["images"]:
                self._check(row, features)
            self._n_encoded += 1
        return features

    def _encode(self, example: dict[str, Any], processor: Any) -> Features | None:
        try:
            encoded = processor.preprocess_dataset({name: [value] for name, value in example.items()})
        except OSError:
            for image in example["_images"]:
                load_image(image)  # names the broken file
            raise
        return {name: values[0] for name, values in encoded.items()} if encoded.get("input_ids") else None


def host_collator(
    model: nn.Module, template: Any, model_args: Any, data_args: Any, tokenizer_module: dict[str, Any]
) -> Collate:
    """The collator of the host's supervised fine-tuning."""
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask
    from llamafactory.extras.constants import IGNORE_INDEX

    return SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        label_pad_token_id=IGNORE_INDEX,
        block_diag_attn=model_args.block_diag_attn,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        compute_dtype=model_args.compute_dtype,
        **tokenizer_module,
    )
