"""The training data of a Trainer: its rows as the collator sees them, their images, and what a selection reads."""

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
from ..heads.tokens import IGNORE_INDEX
from ..hub import local_folder
from ..selection.fingerprint import model_fingerprint
from ..selection.resolve import Run, resolve_targets
from ..selection.samples import STREAM_ROWS, Features, SelectionInputs, encode_caption
from ..teachers.encoder import VisionTeacher
from ..teachers.images import IMAGE_COLUMNS, ImageLike, image_key, images_by, is_stream, sample_images, undecoded
from ..training.checkpoint import checkpoint_of

#: How many rows are looked at for images; of a sized dataset, from its beginning to its end, and all if none has one.
N_LOOKED_AT = 1024
_N_DIGESTED = 8  # rows that a dataset is known by, beside its size


class TrainerRows:
    """The rows of a Trainer's training data, a Source for selection; random state is the caller's business.

    Args:
        trainer: After its constructor, with a training dataset.
        images_of: From a row to its images.
        config: The ``hera_*`` keys.
    """

    def __init__(self, trainer: Any, images_of: Callable[[Any], list[ImageLike]], config: HeraConfig) -> None:
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
        """The images of a row, not decoded where the dataset allows it."""
        return images_by(self._images_of, self._rows[row])

    def encode(self, row: int) -> Features | None:
        """What the trainer's collator makes of the row alone; in mode ``llm`` its labeled tokens, as a caption."""
        batch = self.collate([{"row": row}])
        ids = batch["input_ids"][0]
        attended = batch["attention_mask"][0].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()
        if "labels" not in batch and self._config.pooling == "answer":
            raise ValueError(
                "hera_pooling: answer averages over tokens with a label, and the collator gives no labels; let it "
                "give them, or choose text, mean or last."
            )
        labels = batch["labels"][0][attended].tolist() if "labels" in batch else [IGNORE_INDEX] * int(attended.sum())
        tokens = ids[attended].tolist()
        if self._config.select_mode == "llm":
            return self._caption(tokens, labels)
        return {"input_ids": tokens, "labels": labels, "row": row}

    def _caption(self, tokens: list[int], labels: list[int]) -> Features | None:
        pairs = [(t, label != IGNORE_INDEX) for t, label in zip(tokens, labels, strict=True) if t not in self._media]
        answers = [[token for token, _ in group] for told, group in groupby(pairs, lambda pair: pair[1]) if told]
        if self.tokenizer is None:
            ids = [token for answer in answers for token in answer]
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} if ids else None
        spoken = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        text = "\n".join(answer.strip() for answer in spoken)
        return encode_caption(text, self.tokenizer, len(tokens))

    def collate(self, features: list[Features]) -> dict[str, Any]:
        """The batch that the trainer's own collator makes of some rows, named by their numbers."""
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
        """The dataset's name where it has one, its size, and a digest of some rows, as the model sees them."""
        digest, places = hashlib.sha256(), islice((row for row in spread(len(self)) if self.images(row)), _N_DIGESTED)
        for row in places:
            digest.update(b"".join(map(image_key, self.images(row))))
            digest.update(json.dumps((self.encode(row) or {}).get("input_ids")).encode())
        name = getattr(getattr(self._trainer.train_dataset, "info", None), "dataset_name", None) or "dataset"
        return f"{name} ({len(self)} rows, {digest.hexdigest()[:8]})"


def undecoded_rows(dataset: Any, images_of: Callable[[Any], list[ImageLike]]) -> tuple[Any, Any]:
    """A dataset with its images as they are stored, where only functions of ours look for them; see `undecoded`."""
    return undecoded(dataset) if images_of is sample_images else (dataset, None)


def check_rows(trainer: Any, images_of: Callable[[Any], list[ImageLike]]) -> None:
    """Checks that training data has images, and that the columns which hold them, or the text, reach the collator.

    Raises:
        ValueError: Names ``images_of`` or ``remove_unused_columns``, and the remedy.
    """
    rows, _ = undecoded_rows(trainer.train_dataset, images_of)
    looked_at: Iterator[Any] = islice(rows, N_LOOKED_AT)
    count = f"first {N_LOOKED_AT}"
    if not is_stream(rows):  # some from all over, then all: few may have one
        looked_at = (rows[row] for row in chain(spread(len(rows)), range(len(rows))))
        count = str(len(rows))
    columns: list[str] = []
    for found in looked_at:
        columns = list(found) if isinstance(found, Mapping) else []
        if images_by(images_of, found):
            break
    else:
        raise ValueError(
            f"images_of: found no image in the {count} rows of train_dataset ({', '.join(columns) or 'no columns'}), "
            "and HeRA compares samples by what their images show. Images are looked for in the columns images and "
            "image, and in the image parts of messages, prompt and completion; pass images_of, from a row to a list."
        )
    if not (trainer.args.remove_unused_columns and isinstance(found, dict)):
        return
    trainer._set_signature_columns_if_needed()
    kept = trainer._signature_columns
    lost = [name for name in columns if name not in kept]
    try:
        seen = images_by(images_of, {name: found[name] for name in columns if name in (*kept, *IMAGE_COLUMNS)})
    except KeyError:
        seen = []
    raw = "input_ids" not in columns and any(name in IMAGE_COLUMNS for name in lost)
    if not seen or raw:
        raise ValueError(
            f"remove_unused_columns: True drops the columns {', '.join(lost)} before the collator sees them, and it "
            f"needs {'them: rows are not tokenized' if raw else 'the images in them'}; set it to False."
        )


def spread(count: int) -> Sequence[int]:
    """Up to :data:`N_LOOKED_AT` numbers below ``count``, from the first on, equally far apart."""
    return range(0, count, max(1, -(-count // N_LOOKED_AT)))


def pad_captions(captions: list[Features]) -> dict[str, Any]:
    """A batch for the language model alone; what is padded is neither seen nor averaged."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        name: pad_sequence([torch.tensor(caption[name]) for caption in captions], True, value)
        for name, value in padding.items()
    }


def targets_of(trainer: Any, images_of: Callable[[Any], list[ImageLike]], config: HeraConfig) -> Targets:
    """The heads or layers of a Trainer's run; ``auto`` selects them on its own dataset, collator and model.

    Raises:
        ValueError: As :func:`~.resolve.resolve_targets`; ``auto`` where a process does not hold the whole model; or
            ``hera_select_dataset``, which a Trainer has no folder of datasets for.
    """
    if config.select_dataset is not None:
        raise ValueError(
            f"hera_select_dataset: {config.select_dataset} is a dataset of LLaMA-Factory's, and a Trainer selects on "
            f"its own; remove it. For heads of other data give their file as {config.targets_key}, which "
            "`llamafactory-hera select` writes, or a run of that data with auto (max_steps=1)."
        )
    model, args = trainer.model, trainer.args
    configuration = model_config(model)
    layout = head_layout(configuration)
    name = getattr(configuration, "_name_or_path", "") or type(model).__name__
    # what is no plain tensor here is known by the files it came from
    plain = not _is_sharded(model) and all(p.is_floating_point() for p in model.parameters())
    weights = cache(lambda: model if plain else local_folder(name, "model", "the model"))
    rows = cache(lambda: TrainerRows(trainer, images_of, config))  # once: of a stream it reads the beginning

    def facts() -> dict[str, str]:
        dataset = "" if trainer.train_dataset is None else rows().name
        return {"model": name, "dataset": dataset, "model_fingerprint": model_fingerprint(weights(), layout)}

    def inputs() -> SelectionInputs:
        return SelectionInputs(
            source=rows(),
            load_model=lambda: model,
            collator=lambda _: pad_captions if config.select_mode == "llm" else rows().collate,
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
        raise ValueError(f"{config.targets_key}: auto selects on the training data; give train_dataset.")
    _check_whole(model, config)
    with _evaluating(model, args.device):
        return resolve_targets(config, run)


def autocast_dtype(training_args: Any) -> torch.dtype | None:
    """The half precision in which a run computes; None without one."""
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None


def teacher_dtype(training_args: Any) -> torch.dtype:
    """The type in which a run's teacher computes, in its selection and its training."""
    return (None if training_args.device.type == "cpu" else autocast_dtype(training_args)) or torch.float32


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are not there: sharded by ZeRO-3, or on no device."""
    return any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters())


def _check_whole(model: nn.Module, config: HeraConfig) -> None:
    """Refuses to select where processes do not all hold the same, whole model."""
    sharded = _is_sharded(model)
    alone = sharded or world_size() == 1
    held = gather_objects(None if alone else model_fingerprint(model, head_layout(model_config(model))))
    if sharded or len(set(held)) > 1:
        raise ValueError(
            f"{config.targets_key}: auto needs the whole model on every process, and here it was loaded in parts "
            "(DeepSpeed ZeRO-3, or FSDP's cpu_ram_efficient_loading). Select in a run without that first "
            "(max_steps=1), and name the file that it wrote into output_dir/hera."
        )


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model as selection wants it: on the run's device, without dropout; afterwards as it was."""
    training = {module: module.training for module in model.modules()}
    before = next(model.parameters()).device
    moved = before != device and not hasattr(model, "hf_device_map")
    model.eval()
    try:
        if moved:
            model.to(device)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if moved:
            model.to(before)
