"""HeRA in axolotl: a plugin that reads the ``hera_*`` keys of axolotl's YAML file:

plugins: [llamafactory_hera.integrations.axolotl.HeraPlugin]
hera_teacher: facebook/dinov2-large
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.logging_config import AxolotlOrWarnErrorFilter
from pydantic import Field, create_model

from ..config import HeraConfig
from ..distributed import rank
from ..teachers.images import ImageLike, sample_images
from ..training.checks import NO_FP8
from .messages import in_micro_batches
from .transformers import HeraTrainerMixin

#: A pydantic model of the keys, which axolotl merges into its schema.
HeraArguments = create_model(
    "HeraArguments",
    __module__=__name__,
    **{
        key: (declared.type, Field(default=declared.default, description=declared.metadata["help"]))
        for key, declared in HeraConfig.knobs().items()
    },
)

_KEEP_IMAGES = "rows must keep their images until the collator"
# Key -> the value that HeRA needs, and the reason. The plugin sets missing keys, and refuses other values.
_NEEDED = {
    "remove_unused_columns": (False, _KEEP_IMAGES),
    "skip_prepare_dataset": (True, _KEEP_IMAGES),
    "lora_o_kernel": (False, "the kernel replaces o_proj, where HeRA reads the heads"),
}
_UNDIVIDED = "each process needs whole samples and heads"
# Key -> the reason for refusing the key: it bypasses the trainer, collator or hooks, or divides samples or heads.
_REFUSED = {
    "context_parallel": _UNDIVIDED,
    "context_parallel_size": _UNDIVIDED,
    "sequence_parallel_degree": _UNDIVIDED,
    "tensor_parallel_size": _UNDIVIDED,
    "fp8": NO_FP8,
    "sample_packing": "packed samples share a row and lose their images",
    "batch_flattening": "flattened samples share a row",
    "pretraining_dataset": "it contains only text; use datasets of chat messages with images",
    "diffusion_lm": "axolotl trains diffusion models with its own trainer",
    "rl": "HeRA is for supervised fine-tuning",
    "reward_model": "HeRA is for supervised fine-tuning",
    "process_reward_model": "HeRA is for supervised fine-tuning",
    "hera_select_dataset": "selection reads the run's datasets; to use others, set hera_heads to a selection's file",
    "trainer_cls": "the plugin supplies the trainer",
}


class _OrHera(AxolotlOrWarnErrorFilter):
    """A version of axolotl's filter that does not drop HeRA's INFO messages on the first process."""

    def filter(self, record: logging.LogRecord) -> bool:
        return (record.name.startswith("llamafactory_hera") and rank() == 0) or super().filter(record)


class HeraPlugin(BasePlugin):
    """Adds HeRA to a supervised fine-tuning run of a vision-language model."""

    def register(self, cfg: dict) -> None:
        """Checks the file before anything is loaded, and sets the keys that HeRA needs."""
        for filterer in (logging.getLogger("llamafactory_hera"), *logging.getLogger().handlers):
            filterer.filters = [_OrHera() if isinstance(f, AxolotlOrWarnErrorFilter) else f for f in filterer.filters]
        hera = HeraConfig.from_keys({key: cfg[key] for key in list(cfg) if key.startswith(HeraConfig.PREFIX)})
        cfg.update(hera.keys())
        for key, (needed, why) in _NEEDED.items():
            if cfg.get(key) not in (None, needed):
                raise ValueError(f"{key}: {cfg[key]} does not work with HeRA ({why}); remove the key.")
            cfg[key] = needed
        for key, why in _REFUSED.items():
            value = cfg.get(key)
            if value and value != "none" and not (why is _UNDIVIDED and value in (1, {"size": 1})):
                raise ValueError(f"{key}: {value} does not work with HeRA ({why}); remove the key.")
        if not cfg.get("processor_type"):
            raise ValueError("processor_type: it is not set, so axolotl trains on text only; set it to AutoProcessor.")
        if cfg.get("activation_offloading") == "legacy":
            raise ValueError(
                "activation_offloading: legacy does not work with HeRA (values that are read inside a layer lose "
                "their gradient); write true."
            )
        if cfg.get("train_on_inputs") and hera.pooling == "answer":
            raise ValueError(
                "train_on_inputs: true labels the prompt, but hera_pooling: answer averages over labeled tokens; "
                "remove train_on_inputs, or set hera_pooling: text."
            )

    def get_input_args(self) -> str:
        """Returns the import path of the pydantic model of the keys."""
        return f"{__name__}.HeraArguments"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses a run, before the model is loaded, if another plugin also supplies a trainer."""
        for name, plugin in PluginManager.get_instance().plugins.items():
            trainer = plugin.get_trainer_cls(cfg)
            if trainer is not None and not issubclass(trainer, HeraTrainerMixin):
                raise ValueError(f"plugins: {name} also supplies a trainer, but axolotl uses only one; remove {name}.")
        if cfg.role_boundaries:
            # axolotl 0.19 mistakes its own dictionary class, which has every attribute, for a pydantic model.
            cfg["role_boundaries"] = [dict(boundary) for boundary in cfg.role_boundaries]

    def get_trainer_cls(self, cfg: Any) -> type:
        """Creates a subclass of axolotl's trainer with HeRA and the keys in the YAML file."""
        # Imported here, because the import makes axolotl compose its training arguments from all plugins.
        from axolotl.core.trainers import AxolotlTrainer

        hera = HeraConfig.from_keys({key: cfg[key] for key in HeraConfig.knobs() if key in cfg})
        columns = [dataset.get("field_messages") for dataset in cfg.datasets or []]
        images_of = partial(_images_of, tuple(filter(None, columns)))

        class AxolotlHeraTrainer(HeraTrainerMixin, AxolotlTrainer):
            """axolotl's trainer with HeRA; the keys are bound here, because axolotl's builder does not pass them."""

            in_words = staticmethod(in_micro_batches)

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, hera=hera, images_of=images_of, **kwargs)

            def check_collator(self, hera: HeraConfig) -> None:
                strategy = self.data_collator.processing_strategy
                if hera.pooling == "answer" and not strategy.role_boundaries:
                    raise ValueError(
                        f"hera_pooling: answer averages over labeled tokens, but {type(strategy).__name__} labels the "
                        "prompt; set role_boundaries to the chat template's markers, or set hera_pooling: text."
                    )

        return AxolotlHeraTrainer


def _images_of(columns: tuple[str, ...], row: Mapping[str, Any]) -> list[ImageLike]:
    """Lists the images that axolotl passes to the model: the first of a column, or else all images in the messages."""
    if row.get("images") or row.get("image"):
        return sample_images(row)[:1]
    messages = next((row[name] for name in (*columns, "messages") if row.get(name)), None)
    return sample_images({"messages": messages})
