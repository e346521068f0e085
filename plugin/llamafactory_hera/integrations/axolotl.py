"""HeRA in axolotl: a plugin that reads the ``hera_*`` keys of its YAML and trains with HeRA::

plugins: [llamafactory_hera.integrations.axolotl.HeraPlugin]
hera_heads: L13H12,L7H6
hera_teacher: facebook/dinov2-large
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from axolotl.integrations.base import BasePlugin, PluginManager
from pydantic import Field, create_model

from ..config import HeraConfig
from ..teachers.images import ImageLike, sample_images
from .transformers import HeraTrainerMixin

#: The keys as fields of a pydantic model, which axolotl merges into its schema.
HeraArguments = create_model(
    "HeraArguments",
    __module__=__name__,
    **{
        key: (declared.type, Field(default=declared.default, description=declared.metadata["help"]))
        for key, declared in HeraConfig.knobs().items()
    },
)

# What a run needs, and why; set where the file says nothing, refused where it says something else.
_NEEDED = {
    "remove_unused_columns": (False, "rows keep their images until the collator, where the teacher sees them"),
    "skip_prepare_dataset": (True, "rows keep their images until the collator, where the teacher sees them"),
    "lora_o_kernel": (False, "the kernel does the work of o_proj, whose input is where heads are read"),
}
# What takes a run past the trainer, the collator or the hooks.
_REFUSED = {
    "sample_packing": "packed samples share a row, and are tokenized without their images",
    "batch_flattening": "flattened samples share a row",
    "pretraining_dataset": "it holds text alone; write datasets, of chat messages with images",
    "rl": "HeRA is for supervised fine-tuning",
    "reward_model": "HeRA is for supervised fine-tuning",
    "process_reward_model": "HeRA is for supervised fine-tuning",
    "hera_select_dataset": "heads are selected on datasets; give a file of `llamafactory-hera select` as hera_heads",
    "trainer_cls": "the plugin brings the trainer",
}
# Each process would hold a part of a sample's tokens or heads.
_UNDIVIDED = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")


class HeraPlugin(BasePlugin):
    """Adds HeRA to a supervised fine-tuning run of a vision-language model."""

    def register(self, cfg: dict) -> None:
        """Checks the file before anything is loaded, and sets what HeRA needs.

        Raises:
            ValueError: A key's value is impossible, or does not work with HeRA; names key, value and remedy.
        """
        logger = logging.getLogger("llamafactory_hera")  # axolotl drops INFO of all but its own loggers
        logger.filters.clear()
        logger.propagate = False
        hera = HeraConfig.from_keys({key: cfg[key] for key in list(cfg) if key.startswith(HeraConfig.PREFIX)})
        cfg.update(hera.keys())
        for key, (value, why) in _NEEDED.items():
            if cfg.get(key) not in (None, value):
                raise ValueError(f"{key}: {cfg[key]} does not work with HeRA ({why}); remove the key.")
            cfg[key] = value
        for key, why in _REFUSED.items():
            if cfg.get(key) and cfg[key] != "none":
                raise ValueError(f"{key}: {cfg[key]} does not work with HeRA ({why}); remove the key.")
        for key in _UNDIVIDED:
            if (cfg.get(key) or 1) > 1:
                raise ValueError(f"{key}: {cfg[key]} does not work with HeRA, which reads whole samples; set it to 1.")
        if not cfg.get("processor_type"):
            raise ValueError("processor_type: without it axolotl trains on text alone; write AutoProcessor.")
        if cfg.get("activation_offloading") == "legacy":
            raise ValueError(
                "activation_offloading: legacy does not work with HeRA (what is read inside a layer cannot leave it "
                "with gradient); write true."
            )
        if cfg.get("train_on_inputs") and hera.pooling == "answer":
            raise ValueError(
                "train_on_inputs: true labels the prompt, and hera_pooling: answer reads the tokens with a label; "
                "remove train_on_inputs, or write hera_pooling: text."
            )

    def get_input_args(self) -> str:
        """Where the pydantic model of the keys is."""
        return f"{__name__}.HeraArguments"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses a run whose trainer is another plugin's, before the model is loaded."""
        trainer = PluginManager.get_instance().get_trainer_cls(cfg)
        if trainer is None or not issubclass(trainer, HeraTrainerMixin):
            raise ValueError(
                f"plugins: another one brings its trainer ({trainer.__name__ if trainer else None}), and axolotl "
                "takes the first; put HeraPlugin first, or remove the other."
            )
        if cfg.role_boundaries:
            # axolotl 0.19 takes its own dictionary, which answers every attribute, for a pydantic model and calls None
            cfg["role_boundaries"] = [dict(boundary) for boundary in cfg.role_boundaries]

    def get_trainer_cls(self, cfg: Any) -> type:
        """axolotl's trainer with HeRA as this file sets it up."""
        # here: axolotl composes its training arguments from all plugins when this is imported first
        from axolotl.core.trainers import AxolotlTrainer

        hera = HeraConfig.from_keys({key: cfg[key] for key in HeraConfig.knobs() if key in cfg})
        columns = [dataset.get("field_messages") for dataset in cfg.datasets or []]
        images_of = partial(_images_of, tuple(filter(None, columns)))

        class AxolotlHeraTrainer(HeraTrainerMixin, AxolotlTrainer):
            """Takes what the builder passes; the keys are bound."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, hera=hera, images_of=images_of, **kwargs)

            def check_collator(self, hera: HeraConfig) -> None:
                if hera.pooling == "answer" and not (own := self.data_collator.processing_strategy).role_boundaries:
                    raise ValueError(
                        f"hera_pooling: answer reads the tokens with a label, and {type(own).__name__} labels the "
                        "prompt; write role_boundaries with the marks of the chat template, or hera_pooling: text."
                    )

        return AxolotlHeraTrainer


def _images_of(columns: tuple[str, ...], row: Mapping[str, Any]) -> list[ImageLike]:
    """The images that axolotl shows the model: the first of a column, else all of the messages."""
    if row.get("images") or row.get("image"):
        return sample_images(row)[:1]
    held = next((row[name] for name in (*columns, "messages") if row.get(name)), None)
    return sample_images({"messages": held})
