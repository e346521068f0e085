"""The model, teacher and data of a host run, as the plain objects that a selection uses."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
from llamafactory.data.data_utils import Role, split_dataset
from llamafactory.data.loader import _get_dataset_processor, _get_merged_dataset
from llamafactory.extras.constants import IMAGE_PLACEHOLDER
from llamafactory.model import load_model, load_tokenizer
from torch import nn
from transformers import DataCollatorForSeq2Seq

from llamafactory_hera.calibration.settings import Text
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.families import head_layout
from llamafactory_hera.heads.fingerprint import model_fingerprint
from llamafactory_hera.heads.tokens import IGNORE_INDEX
from llamafactory_hera.integrations.trainer_rows import autocast_dtype, teacher_dtype
from llamafactory_hera.selection.resolve import Run
from llamafactory_hera.selection.samples import STREAM_ROWS, Collate, Features, SelectionInputs, encode_caption
from llamafactory_hera.teachers.encoder import VisionTeacher, whole_model_on_every_rank
from llamafactory_hera.teachers.images import ImageLike

from . import refuse_data_uri
from .checks import check_image_tokens
from .recipe import HostArguments, adapter_folders, model_folder


def selecting_run(config: HeraConfig, host: HostArguments, configuration: Any) -> Run:
    """Describes a training run to the functions that select or check its heads or layers."""

    def origin() -> dict[str, str]:
        layout = head_layout(configuration)
        fingerprint = model_fingerprint(model_folder(host.model), layout, adapter_folders(host.model))
        model, dataset = host.model.model_name_or_path, config.select_dataset or ", ".join(host.data.dataset)
        return {"model": model, "dataset": dataset, "model_fingerprint": fingerprint}

    inputs = partial(selection_inputs, config, host)
    return Run(Path(host.training.output_dir), configuration, origin, inputs, host.training.resume_from_checkpoint)


def selection_inputs(config: HeraConfig, host: HostArguments) -> SelectionInputs:
    """Returns the model, teacher and data of a selection; only the dataset is read immediately."""
    host = host._replace(model=copy.deepcopy(host.model), data=copy.deepcopy(host.data))  # loading changes both
    host.data.cutoff_len += host.data.packing  # packing shortens rows by one token
    host.data.packing = host.data.neat_packing = False  # samples are scored one by one
    if (name := config.select_dataset) is not None:
        host.data.dataset, images = [name], Path(str(host.data.dataset_dir), name, "images")
        host.data.media_dir = str(images) if images.is_dir() else host.data.media_dir
    weights = model_folder(host.model)  # first, because the host's error about a missing model does not name it
    captions = config.select_mode == "llm"  # for the language model, without images
    rows, training = (_Captions if captions else Samples)(host, config.most_samples), host.training
    return SelectionInputs(
        load_teacher=partial(VisionTeacher.from_pretrained, config.teacher, training.device, teacher_dtype(training)),
        weights=weights,
        adapter_folders=adapter_folders(host.model),
        tokenizer=rows.tokenizer,
        **rows.common(),
    )


class _Rows:
    """The training rows of a run, with its tokenizer and template; for a stream, enough rows for ``n_samples``."""

    def __init__(self, host: HostArguments, n_samples: int) -> None:
        model, data, training, _ = self.host = host
        self.tokenizer_module = load_tokenizer(model)
        self.tokenizer = self.tokenizer_module["tokenizer"]
        self.template = get_template_and_fix_tokenizer(self.tokenizer, data)
        with training.main_process_first(desc="load dataset", local=not data.data_shared_file_system):
            merged = _get_merged_dataset(data.dataset, model, data, training, "sft")
            rows = split_dataset(merged, None, data, seed=training.seed)[0]["train"]
        self.rows = list(rows.take(STREAM_ROWS * n_samples)) if data.streaming else rows

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, row: int) -> list[ImageLike]:
        images = self.rows[row]["_images"] or []
        for image in images:
            refuse_data_uri(image, f"dataset: sample {row} (counted from 0)")
        return images

    def collator(self, model: nn.Module) -> Collate:
        """Returns the collator of the host's supervised fine-tuning."""
        return SFTDataCollatorWith4DAttentionMask(
            template=self.template,
            model=model,
            label_pad_token_id=IGNORE_INDEX,
            compute_dtype=self.host.model.compute_dtype,
            **self.tokenizer_module,
        )

    def common(self) -> dict[str, Any]:
        """Returns the inputs that selection and calibration share."""
        return {
            "source": self,
            "collator": self.collator,
            "load_model": self._load_model,
            "model_name": self.host.model.model_name_or_path,
            "dataset_name": ", ".join(self.host.data.dataset),
            "autocast": autocast_dtype(self.host.training),
            "num_workers": self.host.training.dataloader_num_workers,
        }

    def _load_model(self) -> nn.Module:
        with whole_model_on_every_rank():
            return load_model(self.tokenizer, self.host.model, self.host.finetuning, is_trainable=False)


class _Captions(_Rows):
    """The assistant's turns as captions for the language model, without images."""

    def encode(self, row: int) -> Features | None:
        messages = [*self.rows[row]["_prompt"], *self.rows[row]["_response"][:1]]
        turns = [message["content"] for message in messages if message["role"] == Role.ASSISTANT]
        text = "\n".join(turns).replace(IMAGE_PLACEHOLDER, "")
        return encode_caption(text, self.tokenizer, self.host.data.cutoff_len)

    def collator(self, model: nn.Module) -> Collate:
        return DataCollatorForSeq2Seq(self.tokenizer)


class Samples(_Rows):
    """Samples as training sees them, checked for image tokens that were cut off."""

    def __init__(self, host: HostArguments, n_samples: int) -> None:
        super().__init__(host, n_samples)
        self.processor = self.make_processor()

    def encode(self, row: int) -> Features | None:
        example = self.rows[row]
        features = self.encode_with(example, self.processor) if has_answer(example) else None
        # a sample that the host truncates has `cutoff_len` tokens
        if features and features["images"] and len(features["input_ids"]) >= self.host.data.cutoff_len:
            self.check(row, features)
        return features

    def make_processor(self, do_generate: bool = False) -> Any:
        module = self.tokenizer_module
        return _get_dataset_processor(self.host.data, "sft", self.template, **module, do_generate=do_generate)

    def encode_with(self, example: dict[str, Any], processor: Any) -> Features | None:
        encoded = processor.preprocess_dataset({name: [value] for name, value in example.items()})
        return {name: values[0] for name, values in encoded.items()} if encoded.get("input_ids") else None

    def check(self, row: int, features: Features) -> None:
        check_image_tokens(row, features, self.template, self.host.data, **self.tokenizer_module)


class UnlabeledSamples(Samples):
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


def has_answer(example: dict[str, Any]) -> bool:
    return any(response["content"].strip() for response in example["_response"])
