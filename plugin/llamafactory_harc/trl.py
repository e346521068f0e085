"""HARC in TRL's ``SFTTrainer``, on conversational rows ``prompt`` and ``completion`` with the column of the class."""

from trl import SFTTrainer

from .trainer import HarcTrainerMixin


class HarcSFTTrainer(HarcTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with HARC::

    HarcSFTTrainer(model, args, harc=HarcConfig(), train_dataset=dataset, peft_config=LoraConfig(...))
    """
