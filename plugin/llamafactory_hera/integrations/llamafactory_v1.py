"""HeRA in LLaMA-Factory's v1 engine (``USE_V1=1`` on its main branch).

``torchrun -m llamafactory_hera.integrations.llamafactory_v1 recipe.yaml [key=value ...]`` trains with a recipe of that
engine plus ``hera_*`` keys. The engine needs no change.
"""

import json
import os
import sys
from typing import Any

import torch
from llamafactory.v1.accelerator.interface import DistributedInterface
from llamafactory.v1.config import BatchingStrategy, get_args
from llamafactory.v1.core.data_engine import DataEngine
from llamafactory.v1.core.model_engine import ModelEngine
from llamafactory.v1.core.rendering import Renderer
from llamafactory.v1.trainers.sft_trainer import SFTTrainer
from llamafactory.v1.utils.callbacks import TrainerCallback
from omegaconf import OmegaConf
from torch import Tensor

from ..config import HeraConfig
from ..distributed import mean_over_ranks
from ..heads.targets import AUTO
from ..training import Aligner
from .messages import in_micro_batches, show_messages, translated

_IMAGES = "extra_info"  # the only field (a string) that the engine copies from a row into a batch unchanged


class HeraV1Trainer(SFTTrainer):
    """The engine's SFT trainer with HeRA; accepts a ``HeraConfig`` and the arguments of the engine's trainer."""

    def __init__(self, *, hera: HeraConfig, **kwargs: Any) -> None:
        args = kwargs["args"]
        show_messages()
        # The aligner needs the model before the engine wraps it.
        self.aligner = Aligner(kwargs["model"], hera, device=DistributedInterface().current_device, seed=args.seed)
        self.aligner.batch_size = args.micro_batch_size
        super().__init__(**{**kwargs, "renderer": _Renderer(kwargs["renderer"].processor)})
        self.callback_handler.add_callback(_AlignerCallback(self))
        self._step_metrics: dict[str, float] = {}

    def compute_loss(self, batch: dict[str, Any]) -> Tensor:
        """Computes the LM loss of a micro-batch, plus the weighted HeRA term."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        collator = self.aligner.collator(lambda rows: tensors)
        inputs = collator([{"images": json.loads(images)} for images in batch[_IMAGES]])
        prepared = self.aligner.prepare({name: v.to(self.device, non_blocking=True) for name, v in inputs.items()})
        loss = super().compute_loss(batch)
        self.aligner.watch.statistics.add(lm_loss=loss.detach())
        term = self.aligner.loss(prepared).to(loss)
        # The engine weights loss + term by the micro-batch's labeled tokens. This is right for the LM loss, but the
        # term is a mean over micro-batches, so the hook gives each micro-batch the same share of the term's gradient.
        share = 1 / self.train_batch_generator.num_micro_batch
        term.register_hook(lambda gradient: torch.full_like(gradient, share))
        return loss + term

    def save_model(self) -> None:
        """Saves the model as the engine does, and HeRA's state next to it."""
        super().save_model()
        self.aligner.close()
        if DistributedInterface().get_rank() == 0:
            self.aligner.save(self.args.output_dir)


class _Renderer(Renderer):
    """Stores the paths of a row's images in the batch."""

    def process_samples(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for sample in samples:
            parts = [part for message in sample["messages"] for part in message["content"]]
            images = [part["value"] for part in parts if part["type"] == "image_url"]
            if not all(isinstance(image, str) for image in images):
                raise ValueError("image_url: in the v1 engine, HeRA reads images only from files; give their paths.")
            rows += super().process_samples([{**sample, _IMAGES: json.dumps(images)}])
        return rows


class _AlignerCallback(TrainerCallback):
    """Updates the objective's own parameters after each optimizer step, and passes HeRA's values to the log."""

    def __init__(self, trainer: HeraV1Trainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        # At the end of a step the optimizer already has the learning rate of the next one.
        self._learning_rate = self._trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, **kwargs: Any) -> None:
        aligner = self._trainer.aligner
        aligner.after_backward()
        aligner.optimizer_step(self._learning_rate, peak=args.learning_rate)
        if state.global_step % args.logging_steps == 0:
            self._trainer._step_metrics = mean_over_ranks(aligner.logs(), self._trainer.device)


def _check(hera: HeraConfig, args: Any) -> None:
    engine = args.dist_config.name if args.dist_config is not None else None
    strategy, resumed = args.batching_strategy, args.resume_from_checkpoint
    checks = (
        ("cp_size", args.cp_size, args.cp_size > 1, "CP replaces the trainer's loss"),
        ("batching_strategy", strategy, strategy != BatchingStrategy.NORMAL, "only `normal` supports images"),
        ("dist_config.name", engine, engine not in (None, "fsdp2"), "only DDP and fsdp2 are supported"),
        ("resume_from_checkpoint", resumed, resumed is not None, "the engine's checkpoints contain no HeRA state"),
        ("hera_select_dataset", hera.select_dataset, hera.select_dataset is not None, "no heads are selected"),
        (hera.targets_key, AUTO, hera.named_targets == AUTO, "no heads are selected, so name them"),
        ("hera_accumulate", hera.accumulate, hera.accumulate == "gradcache", "the engine runs only one forward pass"),
    )
    for key, value, refused, why in checks:
        if refused:
            raise ValueError(f"{key}: {value} does not work with HeRA in the v1 engine: {why}; change or remove it.")
    with translated(in_micro_batches):
        hera.check_batch(args.micro_batch_size, 1, int(os.environ.get("WORLD_SIZE", 1)))


def run(keys: dict[str, Any]) -> None:
    """Trains with a recipe of the engine plus ``hera_*`` keys."""
    hera = HeraConfig.from_keys({key: value for key, value in keys.items() if key.startswith(HeraConfig.PREFIX)})
    host = {key: value for key, value in keys.items() if not key.startswith(HeraConfig.PREFIX)}
    model_args, data_args, args, _ = get_args(host)
    _check(hera, args)
    DistributedInterface(args)
    data, engine = DataEngine(data_args.train_dataset), ModelEngine(model_args, is_train=True)
    trainer = HeraV1Trainer(hera=hera, args=args, model=engine.model, renderer=engine.renderer, train_dataset=data)
    trainer.fit()
    trainer.save_model()
    DistributedInterface().destroy()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: torchrun -m {__spec__.name} recipe.yaml [key=value ...]")
    run(OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(sys.argv[1]), OmegaConf.from_cli(sys.argv[2:]))))
