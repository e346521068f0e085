"""HARC in transformers' Trainer, and in every trainer built on it."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from llamafactory_hera.distributed import world_size
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.integrations.method_trainer import MethodTrainerMixin
from llamafactory_hera.training.checks import check_parallelism

from .config import HarcConfig
from .coupler import Coupler
from .data import HarcCollator, MixtureSampler, chat_tail, read_rows

#: Arguments of a Trainer that must not be set, and why.
_REFUSED = {
    "use_liger_kernel": "fused losses skip the logits that the KL term compares",
    **dict.fromkeys(("packing", "padding_free"), "a packed row has no single prompt and response"),
    "auto_find_batch_size": "batches have a fixed mixture",
}


class HarcTrainerMixin(MethodTrainerMixin):
    """Adds HARC's term, configured by the ``harc_*`` keys in ``harc``, to the loss of the trainer listed after it.

    Rows of ``train_dataset`` have ``input_ids``, ``labels`` (or TRL's ``completion_mask``) and the class column.
    ``tail`` contains the template's tokens between the user's text and the response; by default, those of the chat
    template. Raises ``ValueError`` if a setting, the data or the model is unsuitable.
    """

    def __init__(self, *args: Any, harc: HarcConfig, tail: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        show_messages()
        self._check()
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        tail = chat_tail(tokenizer) if tail is None else tail
        dataset: Any = self.train_dataset
        extract, train = read_rows(dataset, tail, harc)
        size = self.args.per_device_train_batch_size
        self._mixture = MixtureSampler(train, size, world_size(), self.args.seed)
        self._rows = [row for rows in train.values() for row in rows]
        self._collate = HarcCollator(tokenizer, len(tail))
        self.coupler = Coupler(self.model, harc, extract, self._collate, self.args.output_dir)
        self.use(self.coupler)

    def _check(self) -> None:
        check_parallelism(self.args, self.model)
        for key, why in _REFUSED.items():
            if value := getattr(self.args, key, None):
                raise ValueError(f"{key}: {value} does not work with HARC, because {why}; remove it.")
        if self.is_fsdp_enabled:
            raise ValueError("fsdp: HARC's pass without the adapter was tested only in DDP and DeepSpeed; use either.")
        if not isinstance(self.model, PeftModel) or self.model.active_peft_config.is_prompt_learning:
            raise ValueError("model: HARC compares it with and without its LoRA adapter, but it has none; add one.")
        if self.args.n_gpu > 1:
            raise ValueError(f"n_gpu: {self.args.n_gpu} devices in one process do not work; use torchrun.")

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
        """Adds the term to the loss, or returns it alone if the loss is NaN for lack of harmful rows."""
        return term if self.coupler.unlabeled else super().with_term(loss, term)


class HarcTrainer(HarcTrainerMixin, Trainer):
    """transformers' Trainer with HARC; pass the tokenizer as ``processing_class``."""
