"""HARC in TRL's ``SFTTrainer``, on rows ``prompt`` and ``completion`` (lists of messages) with their class."""

from trl import SFTTrainer

from .trainer import HarcTrainerMixin


class HarcSFTTrainer(HarcTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with HARC: ``HarcSFTTrainer(model, args, harc=HarcConfig(), peft_config=..., ...)``."""
