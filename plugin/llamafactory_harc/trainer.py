"""HARC in transformers' Trainer, and in every trainer that is built on it."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorForSeq2Seq, Trainer

from llamafactory_hera.distributed import world_size
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.integrations.method_trainer import MethodTrainerMixin
from llamafactory_hera.training.checks import check_parallelism

from .config import HarcConfig
from .coupler import Coupler
from .data import HarcCollator, MixtureSampler, chat_tail, read_rows

#: Arguments of a Trainer that must not be set, and why.
_REFUSED = {
    "use_liger_kernel": "fused losses compute no logits, which the KL term compares",
    "packing": "several samples in one row have no single prompt and response",
    "padding_free": "several samples in one row have no single prompt and response",
    "auto_find_batch_size": "batches have a fixed mixture",
    "fsdp": "the base model's pass was tested with DDP and DeepSpeed only",
}


class HarcTrainerMixin(MethodTrainerMixin):
    """Adds HARC's term to the loss of the trainer that it is put in front of.

    Args:
        *args: As for that trainer.
        harc: The ``harc_*`` keys.
        tail: The template's tokens between the user's text and the response; by default those of the chat template
            of ``processing_class``.
        **kwargs: As for that trainer. Rows of ``train_dataset`` have ``input_ids``, ``labels`` (or TRL's
            ``completion_mask``) and their class in the column ``harc_column``.

    Raises:
        ValueError: A setting, the data or the model does not fit; the message states the value and the remedy.
    """

    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, harc: HarcConfig, tail: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        show_messages()
        self._check()
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        tail = chat_tail(tokenizer) if tail is None else tail
        rows = read_rows(self.train_dataset, tail, harc)
        size = self.args.per_device_train_batch_size
        self._mixture = MixtureSampler(rows.train, size, world_size(), self.args.seed)
        self._rows = [row for each in rows.train.values() for row in each]
        self._collate = HarcCollator(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8), len(tail))
        self.coupler = Coupler(self.model, harc, rows.extract, self._collate, self.args.output_dir)
        self.use(self.coupler)

    def _check(self) -> None:
        check_parallelism(self.args, self.model)
        for key, why in _REFUSED.items():
            if value := getattr(self.args, key, None):
                raise ValueError(f"{key}: {value} does not work with HARC, because {why}; remove it.")
        if not isinstance(self.model, PeftModel) or self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "model: HARC compares it with itself without its adapter, and full fine-tuning has none; train LoRA "
                "(peft.get_peft_model)."
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"n_gpu: {self.args.n_gpu} devices in one process are not supported; use torchrun.")

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Returns a loader of batches with a fixed mixture of classes."""
        before = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = self._rows, self._collate
        try:
            return super().get_train_dataloader(*args, **kwargs)
        finally:
            self.train_dataset, self.data_collator = before

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        return self._mixture

    def with_term(self, loss: Tensor, term: Tensor) -> Tensor:
        """Adds the term to the trainer's loss, which is not a number if the micro-batch has no harmful row."""
        return term if self.coupler.unlabeled else super().with_term(loss, term)


class HarcTrainer(HarcTrainerMixin, Trainer):
    """transformers' Trainer with HARC::

    HarcTrainer(peft_model, args, harc=HarcConfig(), train_dataset=rows, processing_class=tokenizer)
    """
