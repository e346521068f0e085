"""Checks the training data after the host has prepared it and before the model is loaded."""

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from typing import Any

from llamafactory_hera.teachers.images import load_image

#: How many samples the checks look at where looking at all would take long.
N_CHECKED = 32


def checked_dataset(get_dataset: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wraps the host's ``get_dataset`` with the checks.

    The wrapper raises ``ValueError`` for a broken image file (naming the sample), for data without any image, and for
    image tokens that ``cutoff_len`` cut off.
    """

    @wraps(get_dataset)
    def get_checked(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **tokenizer_module: Any
    ) -> dict[str, Any]:
        try:
            module = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer_module)
        except OSError as error:
            raise ValueError(_name_broken_image(error, model_args, data_args, training_args)) from error
        train = module.get("train_dataset")
        if train is not None:
            _check_images(train, data_args)
            _check_cutoff(train, template, data_args, **tokenizer_module)
        return module

    return get_checked


def _name_broken_image(error: OSError, model_args: Any, data_args: Any, training_args: Any) -> str:
    from llamafactory.data.loader import _get_merged_dataset

    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    for name in names:
        for row, sample in enumerate(_get_merged_dataset([name], model_args, data_args, training_args, "sft")):
            for image in sample.get("_images") or []:
                try:
                    load_image(image)
                except ValueError as broken:
                    return f"dataset: sample {row} of {name} (counted from 0): {broken}"
    return f"dataset: {', '.join(names)} cannot be read: {error}"


def _check_images(dataset: Any, data_args: Any) -> None:
    rows: Iterable[dict[str, Any]] = dataset
    if hasattr(dataset, "select_columns") and "images" in (dataset.column_names or []):
        rows = dataset.select_columns(["images"])
    elif not hasattr(dataset, "__len__"):
        rows = islice(dataset, N_CHECKED * N_CHECKED)  # a stream has no end to look for
    found = len(list(islice((row for row in rows if row.get("images")), 2)))
    if found < 2:
        raise ValueError(
            f"dataset: {', '.join(data_args.dataset or [])} holds {'one sample with an' if found else 'no'} image, "
            "and HeRA compares samples by what their images show; use a dataset with an `images` column or stage: sft."
        )


def _with_images(dataset: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((row, sample) for row, sample in enumerate(dataset) if sample.get("images"))


def _check_cutoff(dataset: Any, template: Any, data_args: Any, tokenizer: Any, processor: Any = None) -> None:
    for row, sample in islice(_with_images(islice(dataset, N_CHECKED * N_CHECKED)), N_CHECKED):
        check_image_tokens(row, sample, template, data_args, tokenizer, processor)


def check_image_tokens(
    row: int, sample: dict[str, Any], template: Any, data_args: Any, tokenizer: Any, processor: Any = None
) -> None:
    """Checks that ``cutoff_len`` left a sample all of its image tokens.

    Args:
        row: Its number, for the message.
        sample: As the host encoded it.
        template: The host's template, arguments, tokenizer and processor.
        data_args: See ``template``.
        tokenizer: See ``template``.
        processor: See ``template``; None for a model without images.

    Raises:
        ValueError: Some are cut off; names the length that is needed.
    """
    from llamafactory.data.mm_plugin import IMAGE_PLACEHOLDER

    plugin = template.mm_plugin
    if processor is None or getattr(plugin, "image_token", None) is None or not plugin.expand_mm_tokens:
        return
    image_token_id = tokenizer.convert_tokens_to_ids(plugin.image_token)
    images = sample["images"]
    message = [{"role": "user", "content": IMAGE_PLACEHOLDER * len(images)}]
    expanded = plugin.process_messages(message, images, [], [], processor)[0]["content"]
    needed = tokenizer.encode(expanded, add_special_tokens=False).count(image_token_id)
    kept = sample["input_ids"].count(image_token_id)
    if kept < needed:
        length = len(sample["input_ids"]) + needed - kept
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len} cuts {needed - kept} of {needed} image tokens off sample {row} "
            f"(counted from 0); set cutoff_len to {length} or more, plus room for its text."
        )
