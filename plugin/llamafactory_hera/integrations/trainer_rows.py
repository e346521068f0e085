"""Checks of a Trainer's training rows, and the selection of heads or layers on these rows (``auto``)."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..config import HeraConfig
from ..distributed import gather_objects, world_size
from ..heads.families import head_layout, media_token_ids, model_config
from ..heads.targets import AUTO, Targets
from ..heads.tokens import IGNORE_INDEX, token_mask
from ..hub import local_folder
from ..selection.fingerprint import model_fingerprint
from ..selection.resolve import Run, resolve_targets
from ..selection.samples import STREAM_ROWS, Features, SelectionInputs, encode_caption
from ..teachers.encoder import VisionTeacher
from ..teachers.images import IMAGE_COLUMNS, ImageLike, image_key, images_by, is_stream, sample_images, undecoded
from ..training.checkpoint import checkpoint_of

#: The number of rows that are searched for an image, spread over a sized dataset or at the start of a stream. If none
#: has an image, all rows of a sized dataset are searched.
N_SEARCHED = 1024
_N_DIGESTED = 8  # rows in the digest of a dataset

ImagesOf = Callable[[Any], list[ImageLike]]


def undecoded_rows(dataset: Any, images_of: ImagesOf) -> tuple[Any, Any]:
    """Returns a view of the dataset that leaves images encoded, and a function that decodes a row of it.

    A custom ``images_of`` may need decoded images, so it gets the dataset itself, and None instead of the function.
    """
    return undecoded(dataset) if images_of is sample_images else (dataset, None)


def check_rows(trainer: Any, images_of: ImagesOf) -> None:
    """Checks that training rows have images, and that the columns with images and text reach the collator."""
    rows, _ = undecoded_rows(trainer.train_dataset, images_of)
    searched: Any = islice(rows, N_SEARCHED)
    count = f"first {N_SEARCHED}"
    if not is_stream(rows):
        searched, count = (rows[row] for row in chain(_spread(len(rows)), range(len(rows)))), str(len(rows))
    columns: list[str] = []
    for found in searched:
        columns = list(found) if isinstance(found, Mapping) else []
        if images_by(images_of, found):
            break
    else:
        raise ValueError(
            f"images_of: no image was found in the {count} rows of train_dataset ({', '.join(columns) or 'no columns'}"
            "), and HeRA compares samples by their images. It searches the columns images and image, and the image "
            "parts of messages, prompt and completion; pass images_of, a function from a row to a list of images."
        )
    if not (trainer.args.remove_unused_columns and isinstance(found, dict)):
        return
    trainer._set_signature_columns_if_needed()
    lost = [name for name in columns if name not in trainer._signature_columns]
    try:
        seen = images_by(
            images_of, {name: found[name] for name in columns if name not in lost or name in IMAGE_COLUMNS}
        )
    except KeyError:  # a custom function reads a column that is dropped
        seen = []
    raw = "input_ids" not in columns and any(name in IMAGE_COLUMNS for name in lost)
    if not seen or raw:
        raise ValueError(
            f"remove_unused_columns: True drops the columns {', '.join(lost)} before the collator, which needs "
            f"{'them because rows are not tokenized' if raw else 'the images in them'}; set it to False."
        )


def targets_of(trainer: Any, images_of: ImagesOf, config: HeraConfig) -> Targets:
    """Returns the heads or layers of a Trainer's run; ``auto`` selects them with its rows, collator and model."""
    if config.select_dataset is not None:
        raise ValueError(
            f"hera_select_dataset: {config.select_dataset} works in LLaMA-Factory only, because a Trainer selects on "
            f"its training data; remove it, or give {config.targets_key} the file of a selection on other data."
        )
    model, args = trainer.model, trainer.args
    configuration = model_config(model)
    layout = head_layout(configuration)
    name = getattr(configuration, "_name_or_path", "") or type(model).__name__
    # Quantized or sharded parameters are identified by the files that they were loaded from.
    in_memory = not _is_sharded(model) and all(p.is_floating_point() for p in model.parameters())
    weights = cache(lambda: model if in_memory else local_folder(name, "model", "a model"))
    rows = cache(lambda: TrainerRows(trainer, images_of, config))  # once, because it reads the start of a stream

    def facts() -> dict[str, str]:
        dataset = "" if trainer.train_dataset is None else rows().name
        return {"model": name, "dataset": dataset, "model_fingerprint": model_fingerprint(weights(), layout)}

    def inputs() -> SelectionInputs:
        return SelectionInputs(
            source=rows(),
            load_model=lambda: model,
            collator=lambda _: _pad_captions if config.select_mode == "llm" else rows().collate,
            load_teacher=partial(VisionTeacher.from_pretrained, config.teacher, args.device, teacher_dtype(args)),
            model_name=name,
            weights=weights(),
            dataset_name=rows().name,
            autocast=autocast_dtype(args),
            num_workers=args.dataloader_num_workers,
            tokenizer=rows().tokenizer,
        )

    run = Run(Path(args.output_dir), layout, facts, inputs, checkpoint_of(args))
    if config.named_targets != AUTO:
        return resolve_targets(config, run)
    if trainer.train_dataset is None:
        raise ValueError(f"{config.targets_key}: auto selects on the training data; pass train_dataset.")
    _check_whole(model, config)
    with _evaluating(model, args.device):
        return resolve_targets(config, run)


class TrainerRows:
    """The rows of a Trainer's training data as a Source of samples.

    Collators may draw random numbers. The caller restores the random state afterwards.
    """

    def __init__(self, trainer: Any, images_of: ImagesOf, config: HeraConfig) -> None:
        data, self._decode = undecoded_rows(trainer.train_dataset, images_of)
        self._trainer, self._images_of, self._config = trainer, images_of, config
        self._rows: Any = list(islice(data, STREAM_ROWS * config.select_samples)) if is_stream(data) else data
        self._media = media_token_ids(model_config(trainer.model))
        processor = getattr(trainer, "processing_class", None)
        tokenizer = getattr(processor, "tokenizer", processor)
        self.tokenizer = tokenizer if hasattr(tokenizer, "batch_decode") else None

    def __len__(self) -> int:
        return len(self._rows)

    def images(self, row: int) -> list[ImageLike]:
        """Returns the images of a row, encoded if the dataset allows it."""
        return images_by(self._images_of, self._rows[row])

    def encode(self, row: int) -> Features | None:
        """Encodes a row with the trainer's collator; in mode ``llm``, returns its labeled tokens as a caption."""
        batch = self.collate([{"row": row}])
        ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        token_mask(self._config.pooling, ids, mask, labels)  # raises if labels are missing
        attended = token_mask("mean", ids, mask)[0]
        labels = torch.full_like(ids, IGNORE_INDEX) if labels is None else labels
        tokens, labels = ids[0][attended].tolist(), labels[0][attended].tolist()
        if self._config.select_mode == "llm":
            return self._caption(tokens, labels)
        return {"input_ids": tokens, "labels": labels, "row": row}

    def _caption(self, tokens: list[int], labels: list[int]) -> Features | None:
        pairs = [(t, label != IGNORE_INDEX) for t, label in zip(tokens, labels, strict=True) if t not in self._media]
        answers = [[token for token, _ in run] for labeled, run in groupby(pairs, lambda pair: pair[1]) if labeled]
        if self.tokenizer is None:
            ids = [token for answer in answers for token in answer]
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} if ids else None
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return encode_caption("\n".join(text.strip() for text in texts), self.tokenizer, len(tokens))

    def collate(self, features: list[Features]) -> dict[str, Any]:
        """Collates rows, given by their numbers, with the trainer's own collator."""
        rows = [self._rows[feature["row"]] for feature in features]
        if self._decode is not None:
            rows = [self._decode(row) for row in rows]
        if self._trainer.args.remove_unused_columns:
            self._trainer._set_signature_columns_if_needed()
            columns = self._trainer._signature_columns
            rows = [{name: value for name, value in row.items() if name in columns} for row in rows]
        return self._trainer.data_collator(rows)

    @cached_property
    def name(self) -> str:
        """The name of the dataset, if it has one, its size, and a digest of some rows as the model sees them."""
        digest, places = hashlib.sha256(), islice((row for row in _spread(len(self)) if self.images(row)), _N_DIGESTED)
        for row in places:
            digest.update(b"".join(map(image_key, self.images(row))))
            digest.update(json.dumps((self.encode(row) or {}).get("input_ids")).encode())
        name = getattr(getattr(self._trainer.train_dataset, "info", None), "dataset_name", None) or "dataset"
        return f"{name} ({len(self)} rows, {digest.hexdigest()[:8]})"


def _spread(count: int) -> Sequence[int]:
    """Lists up to :data:`N_SEARCHED` numbers below ``count``, evenly spaced from 0 on."""
    return range(0, count, max(1, -(-count // N_SEARCHED)))


def _pad_captions(captions: list[Features]) -> dict[str, Any]:
    """Collates captions into a padded batch for the language model, without images."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: pad_sequence([torch.tensor(caption[name]) for caption in captions], True, value)
        for name, value in padding.items()
    }


def autocast_dtype(training_args: Any) -> torch.dtype | None:
    """Returns the half precision in which a run computes, or None."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


def teacher_dtype(training_args: Any) -> torch.dtype:
    """Returns the type in which the teacher of a run computes, during selection and training."""
    return (None if training_args.device.type == "cpu" else autocast_dtype(training_args)) or torch.float32


def _is_sharded(model: nn.Module) -> bool:
    """Returns whether parameters are missing, because ZeRO-3 sharded them or they are on no device."""
    return any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters())


def _check_whole(model: nn.Module, config: HeraConfig) -> None:
    """Checks that every process has the same complete model."""
    sharded = _is_sharded(model)
    compared = not sharded and world_size() > 1
    fingerprints = gather_objects(model_fingerprint(model, head_layout(model_config(model))) if compared else None)
    if sharded or len(set(fingerprints)) > 1:
        raise ValueError(
            f"{config.targets_key}: auto needs the complete model on every process, but this run loads it in parts "
            "(DeepSpeed ZeRO-3, or FSDP's cpu_ram_efficient_loading). First run one step without sharding "
            f"(max_steps=1), then set {config.targets_key} to the file that this run writes to output_dir/hera."
        )


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to the device of the run and into evaluation mode, and back afterwards."""
    training = [module for module in model.modules() if module.training]
    before = next(model.parameters()).device
    moved = before != device and not hasattr(model, "hf_device_map")
    model.eval()
    try:
        if moved:
            model.to(device)
        yield
    finally:
        for module in training:
            module.training = True
        if moved:
            model.to(before)
