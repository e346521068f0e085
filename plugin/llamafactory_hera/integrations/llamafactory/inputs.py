"""Model, teacher and data of a run's arguments, as the plain objects that selection and calibration work with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from llamafactory_hera.calibration.samples import CalibrationInputs
from llamafactory_hera.calibration.settings import RahConfig, Text
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.pooling import IGNORE_INDEX
from llamafactory_hera.selection.samples import Collate, Features, SelectionInputs, collate_captions, encode_caption
from llamafactory_hera.teachers.encoder import VisionTeacher, whole_model_on_every_rank
from llamafactory_hera.teachers.images import ImageLike, load_image

from .checks import N_CHECKED, check_image_tokens
from .recipe import adapter_folders, model_folder

# Rows of a stream that are read for each sample to draw.
_STREAM_ROWS = 4


def selection_inputs(
    config: HeraConfig, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> SelectionInputs:
    """What a selection needs of a run's arguments; nothing is loaded yet except for the dataset's index.

    Raises:
        ValueError: The model's files cannot be found, or the dataset is refused by the host.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_model, load_tokenizer

    folder = model_folder(model_args)
    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    aligned = aligned_dataset(model_args, data_args, training_args, config.select.samples)
    alone = config.select.mode == "llm"  # the language model, without images

    def whole_model() -> nn.Module:
        with whole_model_on_every_rank():
            return load_model(tokenizer, model_args, finetuning_args, is_trainable=False)

    def collator(model: nn.Module) -> Collate:
        if alone:
            return partial(collate_captions, pad_token_id=tokenizer.pad_token_id or 0)
        return host_collator(model, template, model_args, data_args, tokenizer_module)

    half = half_precision(training_args)
    # as in training
    teacher_dtype = half if half is not None and training_args.device.type != "cpu" else torch.float32
    return SelectionInputs(
        source=CaptionSource(aligned, tokenizer, data_args.cutoff_len)
        if alone
        else HostSource(aligned, template, data_args, tokenizer_module),
        load_model=whole_model,
        collator=collator,
        load_teacher=partial(VisionTeacher.from_pretrained, config.teacher, training_args.device, teacher_dtype),
        model_name=model_args.model_name_or_path,
        model_folder=folder,
        dataset_name=", ".join(data_args.dataset),
        adapter_folders=adapter_folders(model_args),
        autocast=half,
        num_workers=training_args.dataloader_num_workers,
    )


def calibration_inputs(
    config: RahConfig, model_args: Any, data_args: Any, training_args: Any, finetuning_args: Any
) -> CalibrationInputs:
    """What a calibration needs of a run's arguments; nothing is loaded yet except for the dataset's index."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_model, load_tokenizer

    tokenizer_module = load_tokenizer(model_args)
    tokenizer = tokenizer_module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    aligned = aligned_dataset(model_args, data_args, training_args, config.samples)
    return CalibrationInputs(
        source=UnlabelledSource(aligned, template, data_args, tokenizer_module, config.text),
        load_model=lambda: load_model(tokenizer, model_args, finetuning_args, is_trainable=False),
        collator=lambda model: host_collator(model, template, model_args, data_args, tokenizer_module),
        model_name=model_args.model_name_or_path,
        dataset_name=", ".join(data_args.dataset),
        adapter_names=tuple(model_args.adapter_name_or_path or ()),
        autocast=half_precision(training_args),
        num_workers=training_args.dataloader_num_workers,
    )


def half_precision(training_args: Any) -> torch.dtype | None:
    """The type in which a run computes, where it is not the weights' own."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


def aligned_dataset(model_args: Any, data_args: Any, training_args: Any, n_samples: int) -> Any:
    """The training part of a run's dataset in the host's common form; of a stream, rows enough for ``n_samples``."""
    from llamafactory.data.data_utils import split_dataset
    from llamafactory.data.loader import _get_merged_dataset

    with training_args.main_process_first(desc="load dataset", local=not data_args.data_shared_file_system):
        merged = _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, "sft")
        train = split_dataset(merged, None, data_args, seed=training_args.seed)[0]["train"]
    # a stream has no rows to draw from: its beginning, which the host has shuffled, stands for it
    return list(train.take(_STREAM_ROWS * n_samples)) if data_args.streaming else train


def has_answer(example: dict[str, Any]) -> bool:
    """Whether the assistant says anything in the last turn of a sample."""
    return any(response["content"].strip() for response in example["_response"])


class _Rows:
    def __init__(self, aligned: Any) -> None:
        self._aligned = aligned

    def __len__(self) -> int:
        return len(self._aligned)

    def images(self, row: int) -> list[ImageLike]:
        return self._aligned[row]["_images"] or []


class CaptionSource(_Rows):
    """Captions for the language model alone: what the assistant says, its turns joined by line breaks.

    Args:
        aligned: The dataset in the host's common form.
        tokenizer: The model's.
        max_length: Tokens after which a caption is cut.
    """

    def __init__(self, aligned: Any, tokenizer: Any, max_length: int) -> None:
        super().__init__(aligned)
        self._tokenizer, self._max_length = tokenizer, max_length

    def encode(self, row: int) -> Features | None:
        from llamafactory.data.data_utils import Role
        from llamafactory.extras.constants import IMAGE_PLACEHOLDER

        example = self._aligned[row]
        messages = [*example["_prompt"], *example["_response"][:1]]
        spoken = [message["content"] for message in messages if message["role"] == Role.ASSISTANT]
        text = "\n".join(spoken).replace(IMAGE_PLACEHOLDER, "")
        return encode_caption(text, self._tokenizer, self._max_length)


class HostSource(_Rows):
    """Samples as training sees them.

    Args:
        aligned: The dataset in the host's common form.
        template: The host's template.
        data_args: The host's.
        tokenizer_module: Tokenizer and processor.
    """

    def __init__(self, aligned: Any, template: Any, data_args: Any, tokenizer_module: dict[str, Any]) -> None:
        from llamafactory.data.loader import _get_dataset_processor

        super().__init__(aligned)
        self._check: Callable[[int, Features], None] = partial(
            check_image_tokens, template=template, data_args=data_args, **tokenizer_module
        )
        self._n_encoded = 0
        self._processor = _get_dataset_processor(data_args, "sft", template, **tokenizer_module)

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


class UnlabelledSource(HostSource):
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
