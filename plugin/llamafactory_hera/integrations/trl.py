"""HeRA in TRL's ``SFTTrainer``: the mixin in front of it, and what TRL may not be asked for beside it.

TRL reads images from 0.22 on; before, a custom collator does. However it computes its loss, in one go, in
chunks, by a fused head or by Liger, the model's layers run, and that is where the heads are read.
"""

from typing import Any

from trl import SFTTrainer
from trl.trainer import sft_trainer

from ..config import HeraConfig
from .transformers import HeraTrainerMixin


class HeraSFTTrainer(HeraTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with HeRA::

        HeraSFTTrainer(model, args, hera=HeraConfig(heads="L13H12,L7H6"), train_dataset=dataset)

    Arguments are those of ``SFTTrainer`` and :class:`HeraTrainerMixin`.

    Raises:
        ValueError: As for the mixin; samples would share a row of the batch; TRL reads no image of this data; or the
            answers cannot be told from the prompt and ``hera_pooling`` is ``answer``.
    """

    def __init__(self, model: Any, args: Any = None, *others: Any, hera: HeraConfig, **kwargs: Any) -> None:
        for option in ("packing", "padding_free"):
            if getattr(args, option, False):
                raise ValueError(
                    f"{option}: True puts several samples into one row of a batch, and HeRA compares rows, each with "
                    f"its image; set {option}=False."
                )
        super().__init__(model, args, *others, hera=hera, **kwargs)

    def check_collator(self, hera: HeraConfig) -> None:
        """Refuses data that TRL takes for text, and labels on the prompt where answers are averaged."""
        if type(self.data_collator).__module__ != sft_trainer.__name__:
            return  # the caller's
        if not isinstance(self.data_collator, getattr(sft_trainer, "DataCollatorForVisionLanguageModeling", ())):
            raise ValueError(
                "train_dataset: TRL takes it for text, so the model would never see the images that the teacher sees. "
                "TRL looks for them in a column `images`, from 0.22 on (or `image`, from 0.29 on), beside `messages` "
                "or `prompt` and `completion`; name the column so, or pass a data_collator of your own."
            )
        only_answers = self.completion_only_loss or getattr(self.args, "assistant_only_loss", False)
        if hera.pooling == "answer" and not only_answers:
            raise ValueError(
                "hera_pooling: 'answer' averages over the tokens with a label, and TRL labels the prompt of this data "
                "as well. Split `messages` into `prompt` and `completion`, without completion_only_loss=False; or set "
                "assistant_only_loss=True (TRL 1.15 with transformers 5.18, and a chat template with {% generation "
                "%}); or choose pooling='text' or 'mean'."
            )
