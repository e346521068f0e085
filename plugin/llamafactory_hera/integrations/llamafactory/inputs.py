"""Model, teacher and data of a run's arguments, as the plain objects that selection and calibration work with."""

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

from llamafactory_hera.calibration.run import CalibrationInputs
from llamafactory_hera.calibration.settings import RahConfig, Text
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.families import HeadLayout
from llamafactory_hera.heads.tokens import IGNORE_INDEX
from llamafactory_hera.integrations.trainer_rows import autocast_dtype, teacher_dtype
from llamafactory_hera.selection.fingerprint import model_fingerprint
from llamafactory_hera.selection.resolve import Run
from llamafactory_hera.selection.samples import STREAM_ROWS, Collate, Features, SelectionInputs, encode_caption
from llamafactory_hera.teachers.encoder import VisionTeacher, whole_model_on_every_rank
from llamafactory_hera.teachers.images import ImageLike, load_image

from .checks import N_CHECKED, check_image_tokens
from .recipe import HostArguments, adapter_folders, check_datasets, model_folder


def selecting_run(config: HeraConfig, host: HostArguments, layout: HeadLayout) -> Run:
    """What a run of the host must tell to have its heads or layers selected, or checked."""

    def facts() -> dict[str, str]:
        fingerprint = model_fingerprint(model_folder(host.model), layout, adapter_folders(host.model))
        model, dataset = host.model.model_name_or_path, config.select_dataset or ", ".join(host.data.dataset)
        return {"model": model, "dataset": dataset, "model_fingerprint": fingerprint}

    inputs = partial(selection_inputs, config, host)
    return Run(Path(host.training.output_dir), layout, facts, inputs, host.training.resume_from_checkpoint)


def selection_inputs(config: HeraConfig, host: HostArguments) -> SelectionInputs:
    """What a selection needs of a run's arguments; nothing is loaded yet except for the dataset's index."""
    host = host._replace(model=copy.deepcopy(host.model), data=copy.deepcopy(host.data))  # the run's own stay
    name, folder = config.select_dataset, host.data.dataset_dir
    if name is not None:
        check_datasets("hera_select_dataset", [name], folder)
        host.data.dataset, images = [name], Path(str(folder), name, "images")
        host.data.media_dir = str(images) if images.is_dir() else host.data.media_dir
    weights, training = model_folder(host.model), host.training
    data = _HostData(host, config.select_samples)
    alone = config.select_mode == "llm"  # the language model, without images
    return SelectionInputs(
        source=_CaptionSource(data) if alone else _HostSource(data),
        collator=lambda model: DataCollatorForSeq2Seq(data.tokenizer) if alone else data.collator(model),
        load_teacher=partial(VisionTeacher.from_pretrained, config.teacher, training.device, teacher_dtype(training)),
        weights=weights,
        adapter_folders=adapter_folders(host.model),
        tokenizer=data.tokenizer,
        **data.facts,
    )


def calibration_inputs(config: RahConfig, host: HostArguments) -> CalibrationInputs:
    """What a calibration needs of a run's arguments; nothing is loaded yet except for the dataset's index."""
    data = _HostData(host, config.samples)
    return CalibrationInputs(
        source=_UnlabeledSource(data, config.text),
        collator=data.collator,
        adapter_names=tuple(host.model.adapter_name_or_path or ()),
        **data.facts,
    )


class _HostData:
    """Tokenizer, template and the training part of a run's dataset; of a stream rows enough for ``n_samples``."""

    def __init__(self, host: HostArguments, n_samples: int) -> None:
        model, data, training, _ = self.host = host
        self.tokenizer_module = load_tokenizer(model)
        self.tokenizer = self.tokenizer_module["tokenizer"]
        self.template = get_template_and_fix_tokenizer(self.tokenizer, data)
        with training.main_process_first(desc="load dataset", local=not data.data_shared_file_system):
            merged = _get_merged_dataset(data.dataset, model, data, training, "sft")
            train = split_dataset(merged, None, data, seed=training.seed)[0]["train"]
        # a stream has no rows to draw from: its beginning, which the host has shuffled, stands for it
        self.rows = list(train.take(STREAM_ROWS * n_samples)) if data.streaming else train
        self.facts: dict[str, Any] = {
            "load_model": self._load_model,
            "model_name": model.model_name_or_path,
            "dataset_name": ", ".join(data.dataset),
            "autocast": autocast_dtype(training),
            "num_workers": training.dataloader_num_workers,
        }

    def _load_model(self) -> nn.Module:
        with whole_model_on_every_rank():
            return load_model(self.tokenizer, self.host.model, self.host.finetuning, is_trainable=False)

    def processor(self, do_generate: bool = False) -> Any:
        """What encodes samples as supervised fine-tuning does, or their prompts alone."""
        module = self.tokenizer_module
        return _get_dataset_processor(self.host.data, "sft", self.template, **module, do_generate=do_generate)

    def collator(self, model: nn.Module) -> Collate:
        """The collator of the host's supervised fine-tuning."""
        return SFTDataCollatorWith4DAttentionMask(
            template=self.template,
            model=model,
            label_pad_token_id=IGNORE_INDEX,
            block_diag_attn=self.host.model.block_diag_attn,
            attn_implementation=getattr(model.config, "_attn_implementation", None),
            compute_dtype=self.host.model.compute_dtype,
            **self.tokenizer_module,
        )


def _has_answer(example: dict[str, Any]) -> bool:
    return any(response["content"].strip() for response in example["_response"])


class _Rows:
    def __init__(self, data: _HostData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.rows)

    def images(self, row: int) -> list[ImageLike]:
        return self._data.rows[row]["_images"] or []


class _CaptionSource(_Rows):
    """Captions for the language model alone: what the assistant says, its turns joined by line breaks."""

    def encode(self, row: int) -> Features | None:
        example = self._data.rows[row]
        messages = [*example["_prompt"], *example["_response"][:1]]
        spoken = [message["content"] for message in messages if message["role"] == Role.ASSISTANT]
        text = "\n".join(spoken).replace(IMAGE_PLACEHOLDER, "")
        return encode_caption(text, self._data.tokenizer, self._data.host.data.cutoff_len)


class _HostSource(_Rows):
    """Samples as training sees them; the first with images are checked for tokens that were cut off."""

    def __init__(self, data: _HostData) -> None:
        super().__init__(data)
        self._processor = data.processor()
        self._n_encoded = 0

    def encode(self, row: int) -> Features | None:
        example = self._data.rows[row]
        features = self._encode(example, self._processor) if _has_answer(example) else None
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

    def _check(self, row: int, features: Features) -> None:
        data = self._data
        check_image_tokens(row, features, data.template, data.host.data, **data.tokenizer_module)


class _UnlabeledSource(_HostSource):
    """Samples without labels, with other images if asked for: the whole conversation, or what precedes the answer."""

    def __init__(self, data: _HostData, text: Text) -> None:
        super().__init__(data)
        self._text = text
        self._prompt_processor = data.processor(do_generate=True)

    def encode(self, row: int, images: Sequence[ImageLike] | None = None) -> Features | None:
        example = dict(self._data.rows[row])
        if images is not None:
            example["_images"] = list(images)
        whole = self._text == "conversation" and _has_answer(example)
        features = self._encode(example, self._processor if whole else self._prompt_processor)
        if features is None:
            return None
        self._check(row, features)
        return features | {"labels": [IGNORE_INDEX] * len(features["input_ids"])}
