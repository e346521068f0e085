"""HeRA in LLaMA-Factory's v1 engine (``USE_V1=1`` on its main branch), with no change to the host.

``torchrun -m llamafactory_hera.integrations.llamafactory_v1 recipe.yaml`` takes a recipe of that engine with added
``hera_*`` keys.
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
from ..objectives import find
from ..training import Aligner

_NAME = "extra_info"  # the one field of a row that the host carries into the batch as it is: a string


class _Renderer(Renderer):
    """The host's, naming each row's images in the batch."""

    def process_samples(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for sample in samples:
            parts = [part for message in sample["messages"] for part in message["content"]]
            images = [part["value"] for part in parts if part["type"] == "image_url"]
            if not all(isinstance(image, str) for image in images):
                raise ValueError("image_url: HeRA under v1 reads images from files; give their paths.")
            rows += super().process_samples([{**sample, _NAME: json.dumps(images)}])
        return rows


class _Share(torch.autograd.Function):
    """Adds the term to the LM loss; its gradient does not depend on what the host multiplies their sum with.

    The host weights each micro-batch by its number of supervised tokens, which is right for the LM loss. The term is a
    mean over micro-batches.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, term: Tensor, share: float) -> Tensor:
        ctx.share = share
        return loss + term

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(gradients[0], ctx.share), None


class HeraV1Trainer(SFTTrainer):
    """The engine's SFT trainer with HeRA.

    Args:
        hera: The ``hera_*`` keys.
        **kwargs: As for that trainer.

    Raises:
        ValueError: A setting under which HeRA would be wrong or do nothing.
    """

    def __init__(self, *, hera: HeraConfig, **kwargs: Any) -> None:
        args = kwargs["args"]
        _check(hera, args)
        device = DistributedInterface().current_device
        # before the model is wrapped; on rows that name their images
        self.aligner = Aligner(kwargs["model"], hera, device=device, seed=args.seed)
        self.aligner.batch_size = args.micro_batch_size
        super().__init__(**{**kwargs, "renderer": _Renderer(kwargs["renderer"].processor)})
        self.callback_handler.add_callback(_AlignerCallback(self))
        self._step_metrics: dict[str, float] = {}

    def compute_loss(self, batch: dict[str, Any]) -> Tensor:
        """The LM loss of a micro-batch, plus the weighted term."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        collator = self.aligner.collator(lambda rows: tensors)
        inputs = collator([{"images": json.loads(images)} for images in batch[_NAME]])
        micro_batch = self.aligner.prepare({name: v.to(self.device, non_blocking=True) for name, v in inputs.items()})
        assert micro_batch is not None
        loss = super().compute_loss(batch)
        self.aligner.watch.statistics.add(lm_loss=loss.detach())
        term = self.aligner.loss(micro_batch).to(loss)
        return _Share.apply(loss, term, 1 / self.train_batch_generator.num_micro_batch)

    def save_model(self) -> None:
        """As the engine's, with hera/ beside the model."""
        super().save_model()
        self.aligner.close()
        if DistributedInterface().get_rank() == 0:
            self.aligner.save(self.args.output_dir)


class _AlignerCallback(TrainerCallback):
    """Steps what the objective trains after the weights, and hands the curves to the engine's log."""

    def __init__(self, trainer: HeraV1Trainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, **kwargs: Any) -> None:
        # at the step's end the engine's is the next step's
        self._learning_rate = self._trainer.optimizer.param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, **kwargs: Any) -> None:
        aligner = self._trainer.aligner
        aligner.after_backward()
        aligner.optimizer_step(self._learning_rate, peak=args.learning_rate)
        if state.global_step % args.logging_steps == 0:
            self._trainer._step_metrics = mean_over_ranks(aligner.logs(), self._trainer.device)


def _check(hera: HeraConfig, args: Any) -> None:
    engine = args.dist_config.name if args.dist_config is not None else None
    strategy, resumed, size = args.batching_strategy, args.resume_from_checkpoint, args.micro_batch_size
    least = find(hera.objective).least_samples
    refused = {
        f"cp_size: {args.cp_size}": (args.cp_size > 1, "the engine then computes its loss elsewhere"),
        f"batching_strategy: {strategy}": (strategy != BatchingStrategy.NORMAL, "only `normal` takes images"),
        f"dist_config.name: {engine}": (engine not in (None, "fsdp2"), "use DDP or fsdp2"),
        f"resume_from_checkpoint: {resumed}": (resumed is not None, "the engine's checkpoints hold no HeRA state"),
        f"hera_select_dataset: {hera.select_dataset}": (
            hera.select_dataset is not None,
            "it selects nothing; name a file that `llamafactory-hera select` has written as hera_heads",
        ),
        f"hera_accumulate: {hera.accumulate}": (hera.accumulate == "gradcache", "the engine makes one forward pass"),
        f"micro_batch_size: {size}": (
            size * int(os.environ.get("WORLD_SIZE", 1)) + hera.memory < least,
            f"hera_objective: {hera.objective} needs {least} samples together, over all processes or by hera_memory",
        ),
    }
    for setting, (found, why) in refused.items():
        if found:
            raise ValueError(f"{setting} does not work with HeRA under v1: {why}; change or remove it.")


def run(keys: dict[str, Any]) -> None:
    """Trains by a recipe of the engine with ``hera_*`` keys.

    Raises:
        ValueError: A setting under which HeRA would be wrong or do nothing.
    """
    hera = HeraConfig.from_keys({key: value for key, value in keys.items() if key.startswith(HeraConfig.PREFIX)})
    host = {key: value for key, value in keys.items() if not key.startswith(HeraConfig.PREFIX)}
    model_args, data_args, training_args, _ = get_args(host)
    _check(hera, training_args)
    DistributedInterface(training_args)
    dataset = DataEngine(data_args.train_dataset)
    engine = ModelEngine(model_args, is_train=True)
    trainer = HeraV1Trainer(
        hera=hera, args=training_args, model=engine.model, renderer=engine.renderer, train_dataset=dataset
    )
    trainer.fit()
    trainer.save_model()
    DistributedInterface().destroy()


def main() -> None:
    """Trains by the recipe that the command line names; ``key=value`` behind it overrides."""
    if len(sys.argv) < 2:
        raise SystemExit(
            "usage: torchrun -m llamafactory_hera.integrations.llamafactory_v1 recipe.yaml [key=value ...]"
        )
    recipe = OmegaConf.merge(OmegaConf.load(sys.argv[1]), OmegaConf.from_cli(sys.argv[2:]))
    keys: Any = OmegaConf.to_container(recipe)
    run(keys)


if __name__ == "__main__":
    main()
