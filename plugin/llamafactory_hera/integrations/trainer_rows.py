"""Checks of a Trainer's training rows, and the selection of heads or layers on these rows (``auto``)."""

from collections.abc import Mapping
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import RemoveColumnsCollator

from ..config import HeraConfig
from ..distributed import gather_objects, world_size
from ..heads.families import head_layout, model_config
from ..heads.fingerprint import is_sharded, model_fingerprint, weights_of
from ..heads.targets import AUTO, Targets
from ..selection.resolve import Run, resolve_targets
from ..selection.rows import N_SEARCHED, CollatedRows, ImagesOf, evaluating, is_frozen, spread
from ..selection.samples import STREAM_ROWS, SelectionInputs, with_mode
from ..teachers.images import IMAGE_COLUMNS, images_by, is_stream, undecoded
from ..training.checkpoint import checkpoint_of


def row_with_image(dataset: Any, images_of: ImagesOf) -> Any:
    """Searches the dataset for a row with an image; raises ``ValueError`` if there is none."""
    rows, _ = undecoded(dataset, images_of)
    searched: Any = islice(rows, N_SEARCHED)
    count = f"first {N_SEARCHED}"
    if not is_stream(rows):
        searched, count = (rows[row] for row in chain(spread(len(rows)), range(len(rows)))), str(len(rows))
    columns: list[str] = []
    for row in searched:
        columns = list(row) if isinstance(row, Mapping) else []
        if images_by(images_of, row):
            return row
    raise ValueError(
        f"images_of: no image was found in the {count} rows of train_dataset ({', '.join(columns) or 'no columns'}), "
        "but HeRA compares samples by their images. It reads the images and image columns, and the image parts of "
        "messages, prompt and completion; pass images_of, a function that maps a row to a list of images."
    )


def check_rows(trainer: Any, images_of: ImagesOf) -> None:
    """Checks that training rows have images, and that the columns with images and text reach the collator."""
    row = row_with_image(trainer.train_dataset, images_of)
    if not (trainer.args.remove_unused_columns and isinstance(row, dict)):
        return
    trainer._set_signature_columns_if_needed()
    lost = [name for name in row if name not in trainer._signature_columns]
    kept = {name: value for name, value in row.items() if name not in lost or name in IMAGE_COLUMNS}
    try:
        seen = images_by(images_of, kept)
    except KeyError:  # a custom function reads a column that is dropped
        seen = []
    raw = "input_ids" not in row and any(name in IMAGE_COLUMNS for name in lost)
    if not seen or raw:
        raise ValueError(
            f"remove_unused_columns: True drops the columns {', '.join(lost)} before the collator, which needs "
            f"{'them because rows are not tokenized' if raw else 'the images in them'}; set it to False."
        )


def targets_of(trainer: Any, images_of: ImagesOf, config: HeraConfig) -> Targets:
    """Returns the heads or layers of a Trainer's run; ``auto`` selects with the run's rows, collator and model."""
    if config.select_dataset is not None:
        raise ValueError(
            f"hera_select_dataset: {config.select_dataset} works in LLaMA-Factory only, because a Trainer selects on "
            f"its training data; remove the key, or set {config.targets_key} to the file of a selection on other data."
        )
    model, args = trainer.model, trainer.args
    configuration = model_config(model)
    layout, checkpoint = head_layout(configuration), checkpoint_of(args)
    if config.named_targets == AUTO:
        config = with_mode(config, configuration, is_frozen(model))
    weights = cache(lambda: weights_of(model))
    rows = cache(lambda: _rows_of(trainer, images_of, config))  # cached, because each call reads a stream's start

    def origin() -> dict[str, str]:
        dataset = "" if trainer.train_dataset is None else rows().name
        fingerprint = model_fingerprint(weights(), layout, resumed=checkpoint is not None)
        return {"model": rows().model_name, "dataset": dataset, "model_fingerprint": fingerprint}

    def inputs() -> SelectionInputs:
        others = {"autocast": autocast_dtype(args), "num_workers": args.dataloader_num_workers}
        return rows().inputs(model, weights(), args.device, teacher_dtype(args), **others)

    run = Run(Path(args.output_dir), configuration, origin, inputs, checkpoint)
    if config.named_targets != AUTO:
        return resolve_targets(config, run)
    if trainer.train_dataset is None:
        raise ValueError(f"{config.targets_key}: auto selects on the training data; pass train_dataset.")
    if trainer.pieces_of is not None:
        raise ValueError(f"{config.targets_key}: auto cannot score packed rows; first select on unpacked rows.")
    _check_whole(model, config)
    with evaluating(model, args.device):
        return resolve_targets(config, run)


def _rows_of(trainer: Any, images_of: ImagesOf, config: HeraConfig) -> CollatedRows:
    """Returns the rows of a Trainer's training data, encoded by the trainer's own collator."""
    data, decode = undecoded(trainer.train_dataset, images_of)
    rows: Any = list(islice(data, STREAM_ROWS * config.most_samples)) if is_stream(data) else data

    def collate(rows: list[Any]) -> dict[str, Any]:
        if decode is not None:
            rows = [decode(row) for row in rows]
        collator = trainer.data_collator
        if trainer.args.remove_unused_columns:
            trainer._set_signature_columns_if_needed()
            collator = RemoveColumnsCollator(collator, trainer._signature_columns)
        return collator(rows)

    name = getattr(getattr(trainer.train_dataset, "info", None), "dataset_name", None) or "dataset"
    processor = getattr(trainer, "processing_class", None)
    return CollatedRows(trainer.model, rows, collate, images_of, config, processor, name)


def autocast_dtype(training_args: Any) -> torch.dtype | None:
    """Returns the half-precision type of a run's computations, or None."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


def teacher_dtype(training_args: Any) -> torch.dtype:
    """Returns the type of the teacher's computations during the selection and training of a run."""
    return (None if training_args.device.type == "cpu" else autocast_dtype(training_args)) or torch.float32


def _check_whole(model: nn.Module, config: HeraConfig) -> None:
    """Checks that every process has the same complete model."""
    sharded = is_sharded(model)
    compared = not sharded and world_size() > 1
    fingerprints = gather_objects(model_fingerprint(model, head_layout(model_config(model))) if compared else None)
    if sharded or len(set(fingerprints)) > 1:
        raise ValueError(
            f"{config.targets_key}: auto needs the complete model in every process, but this run loads it in parts "
            "(DeepSpeed ZeRO-3, or FSDP's cpu_ram_efficient_loading). First run one step without sharding "
            f"(max_steps=1), then set {config.targets_key} to the file that the short run writes to output_dir/hera."
        )
