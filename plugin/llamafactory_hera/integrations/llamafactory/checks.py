"""Refuses settings, models and data with which HeRA would be wrong or do nothing, before any weight is loaded."""

from collections.abc import Callable, Iterable
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any

from llamafactory.data.loader import _get_merged_dataset
from llamafactory.data.mm_plugin import IMAGE_PLACEHOLDER
from llamafactory.model import load_config

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads.families import HeadLayout, head_layout
from llamafactory_hera.heads.tokens import grid_side
from llamafactory_hera.objectives import Objective, TokenObjective
from llamafactory_hera.teachers.encoder import VisionTeacher, check_teacher
from llamafactory_hera.teachers.images import load_image
from llamafactory_hera.training.checkpoint import earlier_values
from llamafactory_hera.training.checks import check_batch, check_output, check_parallelism

from .recipe import HostArguments, check_stream

#: How many samples the checks look at where looking at all would take long.
N_CHECKED = 32
#: Key -> why heads cannot be read under it, and what to do.
UNREADABLE = {
    "use_unsloth": "Unsloth replaces the attention that heads are read from; remove it",
    "use_kt": "KTransformers runs layers outside of PyTorch; remove it",
    "mixture_of_depths": "tokens skip layers, so a head has no average over them; remove it",
}
_MODEL_KEYS = UNREADABLE | {
    "use_unsloth_gc": "its checkpointing cannot carry the heads' outputs; remove it, or set use_reentrant_gc: false",
    "shift_attn": "it moves tokens between heads; remove it",
}
_PACKED = "a packed row holds several samples, and HeRA compares samples; set it to false"
# neat_packing first: the host sets packing where it is asked for
_DATA_KEYS = {"neat_packing": _PACKED, "packing": _PACKED}


def check_run(config: HeraConfig, host: HostArguments) -> HeadLayout:
    """Checks everything that needs no weights, and returns the layout of the model's text decoder.

    Raises:
        ValueError: Names the key, the value and the remedy.
    """
    for arguments, keys in ((host.model, _MODEL_KEYS), (host.data, _DATA_KEYS)):
        refuse_keys(arguments, keys, "stage: hera")
    check_parallelism(host.training)
    check_batch(config, host.training)
    check_folders(host.training.output_dir, host, config)
    check_stream(host.data, host.training)
    model_config = multimodal_config(host.model, "HeRA aligns heads with what images show")
    if config.objective_from is not None:
        earlier_values(config)
    objective = config.objective_class()
    if issubclass(objective, TokenObjective):
        teacher = objective.teacher_class or VisionTeacher
        teacher.check(config.teacher, grid_side(model_config, config.objective))
        objective.check_model(model_config, str(host.model.flash_attn))
    else:
        check_teacher(config.teacher)
    return head_layout(model_config)


def check_folders(output_dir: str, host: HostArguments, config: HeraConfig | None = None) -> None:
    """Checks that ``output_dir`` is a folder of its own, apart from model, data, teacher and cache."""
    model, data = host.model, host.data
    apart = {"model_name_or_path": model.model_name_or_path, "hera_teacher": config.teacher if config else None}
    apart |= {f"adapter_name_or_path[{n}]": name for n, name in enumerate(model.adapter_name_or_path or [])}
    for key in ("dataset_dir", "media_dir"):  # beside the files of a dataset a run may write
        folder = getattr(data, key)
        inside = isinstance(folder, str) and Path(folder).resolve() in Path(output_dir).resolve().parents
        apart[key] = folder if isinstance(folder, str) and not (inside and folder == data.dataset_dir) else None
    check_output(output_dir, {"hera_teacher_cache": config.teacher_cache if config else None, **apart})


def refuse_keys(arguments: Any, keys: dict[str, str], purpose: str) -> None:
    """Refuses keys that are set; ``keys`` says why they do not work with the purpose, and what to do."""
    for key, why in keys.items():
        if value := getattr(arguments, key, None):
            raise ValueError(f"{key}: {value} does not work with {purpose}: {why}.")


def multimodal_config(model_args: Any, why: str) -> Any:
    """The model's configuration, which must be a multimodal model's."""
    config = load_config(model_args)
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"model_name_or_path: {model_args.model_name_or_path} is a text-only model ({config.model_type}), and "
            f"{why}; give a multimodal model (`llamafactory-hera build` makes one from an LLM)."
        )
    return config


def checked_dataset(
    get_dataset: Callable[..., dict[str, Any]], objective: type[Objective]
) -> Callable[..., dict[str, Any]]:
    """The host's ``get_dataset``, refusing broken images, data without images, and image tokens that are cut off."""

    @wraps(get_dataset)
    def get_checked(
        template: Any, model_args: Any, data_args: Any, training_args: Any, stage: str, **tokenizer_module: Any
    ) -> dict[str, Any]:
        try:
            module = get_dataset(template, model_args, data_args, training_args, stage=stage, **tokenizer_module)
        except OSError as error:
            # the host's error may print an image that the dataset holds as base64, all of it
            raise ValueError(_name_broken_image(error, model_args, data_args, training_args)) from None
        train = module.get("train_dataset")
        if train is not None:
            _check_images(train, data_args, max(2, objective.least_samples))
            first = enumerate(islice(train, N_CHECKED * N_CHECKED))
            for row, sample in islice((each for each in first if each[1].get("images")), N_CHECKED):
                check_image_tokens(row, sample, template, data_args, **tokenizer_module)
        return module

    return get_checked


def _name_broken_image(error: OSError, model_args: Any, data_args: Any, training_args: Any) -> str:
    names = [*(data_args.dataset or []), *(data_args.eval_dataset or [])]
    for name in names:
        for row, sample in enumerate(_get_merged_dataset([name], model_args, data_args, training_args, "sft")):
            for image in sample.get("_images") or []:
                try:
                    load_image(image)
                except ValueError as broken:
                    return f"dataset: sample {row} of {name} (counted from 0): {broken}"
    return f"dataset: {', '.join(names)} cannot be read: {error}"


def _image_rows(dataset: Any) -> Iterable[dict[str, Any]]:
    """The rows, without other columns where those can be left out, of a stream the first."""
    if hasattr(dataset, "select_columns") and "images" in (dataset.column_names or []):
        return dataset.select_columns(["images"])
    return dataset if hasattr(dataset, "__len__") else islice(dataset, N_CHECKED * N_CHECKED)


def _check_images(dataset: Any, data_args: Any, least: int) -> None:
    rows = _image_rows(dataset)
    found = len(list(islice((row for row in rows if row.get("images")), least)))
    if found < least:
        held = {0: "no", 1: "one sample with an"}.get(found, f"{found} samples with an")
        raise ValueError(
            f"dataset: {', '.join(data_args.dataset or [])} holds {held} image, and HeRA compares {least} or more by "
            "what their images show; use a dataset with an `images` column, raise max_samples, or use stage: sft."
        )


def check_image_tokens(
    row: int, sample: dict[str, Any], template: Any, data_args: Any, tokenizer: Any, processor: Any = None
) -> None:
    """Checks that ``cutoff_len`` left sample ``row``, as the host encoded it, all of its image tokens."""
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
