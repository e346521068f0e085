"""HARC in TRL's ``SFTTrainer``, for rows with ``prompt``, ``completion`` (both lists of messages) and a class."""

from trl import SFTTrainer

from .trainer import HarcTrainerMixin


class HarcSFTTrainer(HarcTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with HARC: ``HarcSFTTrainer(model, args, harc=HarcConfig(), peft_config=..., ...)``."""
