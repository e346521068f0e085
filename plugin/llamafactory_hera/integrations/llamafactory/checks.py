"""Before weights are loaded, refuses settings, models and data with which HeRA would be wrong or do nothing."""

from collections.abc import Callable
from functools import wraps
from itertools import islice, pairwise
from typing import Any

from llamafactory.extras.constants import IMAGE_PLACEHOLDER
from llamafactory.model import load_config

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.distributed import world_size
from llamafactory_hera.heads.families import HeadLayout, head_layout
from llamafactory_hera.heads.tokens import grid_side
from llamafactory_hera.integrations.trainer_rows import row_with_image
from llamafactory_hera.objectives import TokenObjective
from llamafactory_hera.selection.samples import with_mode
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import sample_images
from llamafactory_hera.training.checkpoint import earlier_values
from llamafactory_hera.training.checks import NO_FP8, check_output, check_parallelism
from llamafactory_hera.training.collator import Piece

from .recipe import HostArguments

_N_CHECKED = 32  # the number of samples with images whose tokens are counted
#: Key -> why heads cannot be read with it.
UNREADABLE = {
    "use_unsloth": "Unsloth replaces the attention that heads are read from",
    "use_kt": "KTransformers runs layers outside of PyTorch",
    "mixture_of_depths": "tokens skip layers, so the average of a head over tokens is undefined",
}
_REFUSED = UNREADABLE | {
    "use_unsloth_gc": "Unsloth's checkpointing hides the outputs of heads from HeRA",
    "shift_attn": "it moves tokens between heads",
    "fp8": NO_FP8,
    "use_ray": "HeRA is untested in Ray's workers (USE_RAY=1 also sets the key)",
}


def check_run(config: HeraConfig, host: HostArguments) -> Any:
    """Runs the checks of a training run that need no weights, and returns the configuration of the model."""
    refuse_keys(host, _REFUSED, "stage: hera")
    check_parallelism(host.training)
    size, steps = host.training.per_device_train_batch_size, host.training.gradient_accumulation_steps
    config.check_batch(size, steps, world_size(), host.data.neat_packing)
    check_folders(host.training.output_dir, host)
    model_config = multimodal_config(host.model)
    if config.objective_from is not None:
        earlier_values(config)
    objective = config.objective_class()
    if issubclass(objective, TokenObjective):
        teacher = objective.teacher_class or VisionTeacher
        teacher.check(config.teacher, grid_side(model_config, config.objective))
        objective.check_model(model_config, str(host.model.flash_attn))
    else:
        VisionTeacher.check(config.teacher)
    _check_packing(head_layout(model_config), host)
    return model_config


def _check_packing(layout: HeadLayout, host: HostArguments) -> None:
    """Refuses packed rows if the model would mix their samples, or if its loss cannot read their attention mask."""
    flash, text = host.model.flash_attn == "fa2", layout.model_type
    others = [f"L{index}" for index, layer in enumerate(layout.layers) if layer.mixer != "attention"]
    key, why, remedy = "neat_packing", "", "remove the key"
    if not host.data.neat_packing:
        key, why, remedy = "packing", "the samples of a row attend to each other", "set neat_packing: true"
    elif others and not (flash and text.startswith("qwen3_5")):
        why = f"{', '.join(others)} of {text} ignore the boundaries between samples (Qwen3.5 needs flash_attn: fa2)"
    elif text.startswith(("gemma3", "gemma4", "llama4")) and not flash:  # fails even without HeRA
        why = f"the loss of {text} cannot read the attention mask of packed rows"
    refuse_keys(host, {key: why} if why else {}, "stage: hera", remedy)


def check_folders(output_dir: str, host: HostArguments) -> None:
    """Checks that the output folder is not the folder of the model, of an adapter or of the data."""
    model, data = host.model, host.data
    inputs = {"model_name_or_path": model.model_name_or_path}
    inputs |= {f"adapter_name_or_path[{n}]": name for n, name in enumerate(model.adapter_name_or_path or [])}
    inputs |= {key: getattr(data, key) for key in ("dataset_dir", "media_dir") if isinstance(getattr(data, key), str)}
    check_output(output_dir, inputs)


def refuse_keys(host: HostArguments, keys: dict[str, str], purpose: str, remedy: str = "remove the key") -> None:
    """Refuses each key of ``keys`` that is set; ``keys`` maps every key to the reason."""
    for key, why in keys.items():
        if value := next(filter(None, (getattr(part, key, None) for part in host)), None):
            raise ValueError(f"{key}: {value} does not work with {purpose}, because {why}; {remedy}.")


def multimodal_config(model_args: Any) -> Any:
    """Loads the configuration of the model, which must be multimodal."""
    config = load_config(model_args)
    if getattr(config, "vision_config", None) is None:
        raise ValueError(
            f"model_name_or_path: {model_args.model_name_or_path} is a text-only model ({config.model_type}); give a "
            "multimodal model (`llamafactory-hera build` makes one from an LLM)."
        )
    return config


def resolved_mode(config: HeraConfig, host: HostArguments) -> HeraConfig:
    """Replaces ``hera_select_mode: auto`` with the mode that fits the model and the run."""
    projector_only = host.finetuning.freeze_language_model and not host.finetuning.freeze_multi_modal_projector
    return with_mode(config, load_config(host.model), projector_only)


def checked_dataset(get_dataset: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wraps the host's ``get_dataset`` to refuse data without images or with truncated image tokens."""

    @wraps(get_dataset)
    def get_checked(template: Any, model_args: Any, data_args: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        module = get_dataset(template, model_args, data_args, *args, **kwargs)
        if (train := module.get("train_dataset")) is not None:
            row_with_image(train, sample_images)
            if data_args.neat_packing:
                packed_pieces(next(iter(train)))
            first = enumerate(islice(train, _N_CHECKED**2))
            for row, sample in islice((each for each in first if each[1].get("images")), _N_CHECKED):
                check_image_tokens(row, sample, template, data_args, kwargs["tokenizer"], kwargs.get("processor"))
        return module

    return get_checked


def packed_pieces(row: dict[str, Any]) -> list[Piece]:
    """Returns the samples in a row of ``neat_packing``, without the padding at its end."""
    if (packed := row.get("packing_params")) is None:
        raise ValueError(
            "neat_packing: True needs the packing_params column, which says where the samples of a row begin, but a "
            "row lacks it; if tokenized_path has data from an older LLaMA-Factory, tokenize the data again."
        )
    boundaries, of_images = packed["sequence_boundaries"], packed["image_subseq_ids"]
    if packed["right_padding_length"]:
        boundaries = boundaries[:-1]
    return [
        Piece(start, stop, [image for image, piece in enumerate(of_images) if piece == number])
        for number, (start, stop) in enumerate(pairwise(boundaries))
    ]


def check_image_tokens(
    row: int, sample: dict[str, Any], template: Any, data_args: Any, tokenizer: Any, processor: Any = None
) -> None:
    """Checks that ``cutoff_len`` cut no image tokens off ``sample``, which the host encoded from row ``row``."""
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
        length = len(sample["input_ids"]) + needed - kept  # a packed sample that was cut has its own row
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len + data_args.packing} cuts {needed - kept} of {needed} image tokens "
            f"off sample {row} (counted from 0); set cutoff_len to {length} or more, plus room for the sample's text."
        )
