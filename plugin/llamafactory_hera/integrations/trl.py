"""HeRA in TRL's ``SFTTrainer``, and the options of TRL that do not work with it.

TRL reads images since version 0.22; older versions need a custom collator. TRL computes its loss in several ways (at
once, in chunks, fused with lm_head, with Liger). All of them work, because HeRA reads heads inside the layers.
"""

from typing import Any

from trl import SFTTrainer
from trl.trainer import sft_trainer

from ..config import HeraConfig
from .transformers import HeraTrainerMixin


class HeraSFTTrainer(HeraTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with HeRA:

        HeraSFTTrainer(model, args, hera=HeraConfig(heads="L13H12,L7H6"), train_dataset=dataset)

    The arguments are those of ``SFTTrainer`` and ``HeraTrainerMixin``.

    Raises:
        ValueError: As in the mixin; also if an option puts several samples into one row of a batch, if TRL finds no
            image in the data, or if ``hera_pooling`` is ``answer`` and TRL labels the prompt.
    """

    def __init__(self, model: Any, args: Any = None, *others: Any, hera: HeraConfig, **kwargs: Any) -> None:
        for option in ("packing", "padding_free"):
            if getattr(args, option, False):
                raise ValueError(
                    f"{option}: True puts several samples into one row of a batch, but HeRA compares rows; "
                    f"set {option}=False."
                )
        super().__init__(model, args, *others, hera=hera, **kwargs)

    def check_collator(self, hera: HeraConfig) -> None:
        """Refuses data that TRL treats as text, and labels on the prompt if HeRA averages over answers."""
        if type(self.data_collator).__module__ != sft_trainer.__name__:
            return  # a custom collator
        if not isinstance(self.data_collator, getattr(sft_trainer, "DataCollatorForVisionLanguageModeling", ())):
            raise ValueError(
                "train_dataset: TRL treats it as text, so the model would not see the images. TRL reads an `images` "
                "column (since 0.22) or an `image` column (since 0.29) next to `messages`, or next to `prompt` and "
                "`completion`; rename the column, or pass a data_collator."
            )
        only_answers = self.completion_only_loss or getattr(self.args, "assistant_only_loss", False)
        if hera.pooling == "answer" and not only_answers:
            raise ValueError(
                "hera_pooling: answer averages over the tokens with a label, but TRL also labels the prompt in this "
                "data. Split `messages` into `prompt` and `completion` (without completion_only_loss=False), set "
                "assistant_only_loss=True (TRL 1.15 with transformers 5.18, and a chat template with {% generation "
                "%}), or set hera_pooling: text or mean."
            )
