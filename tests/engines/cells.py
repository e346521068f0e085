"""Picklable functions that the tests run on every rank."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.objectives import Options, Plan, Step, TokenBatch
from llamafactory_hera.rivals import jarvis
from llamafactory_hera.rivals.jarvis import Jarvis, draw_blocks
from llamafactory_hera.rivals.ross import DRAWS, Ross
from llamafactory_hera.training import Aligner
from llamafactory_hera.training.gradcache import keep_random_state
from tests.tiny_models import autoencoder_folder, student_processor, teacher_folder

from .engines import ENGINES
from .tiny import HEADS, Batch, K, batches, build

#: Gradients by data, loss and parameter name.
Gradients = dict[str, dict[str, dict[str, Tensor]]]

TAU = "log_temperature"


#: Weights of the LM loss and of the HeRA term. The LM loss is multiplied by 0, not left out: DDP needs every
#: parameter in the graph.
LOSSES = {"both": (1.0, 0.1), "hera": (0.0, 1.0)}
#: The dtypes of the parameters and of the matrix products, by precision.
PRECISIONS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
}


class GivenRoss(Ross):
    """A small ROSS without zero weights; its noise depends only on the sample."""

    width, depth, heads = 32, 2, 4

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, batch: TokenBatch) -> Tensor:
        latents = batch.teacher
        times = torch.linspace(50, 900, DRAWS).long().unsqueeze(1).expand(-1, len(latents))
        noise = torch.stack([(3 * draw * latents + draw).sin() for draw in range(1, DRAWS + 1)])
        return self.loss(batch.tokens[0], latents, times, noise)[None]


class GivenJarvis(Jarvis):
    """A JARVIS that masks blocks in every micro-batch; the blocks depend only on the sample."""

    def prepare(self, step: Step) -> Plan:
        drawn = []
        for ids, attended in zip(step.input_ids, step.attention_mask, strict=True):
            generator = torch.Generator().manual_seed(int(ids[attended].sum()))
            drawn.append(draw_blocks(step.side, 1, generator))
        blocks = tuple(torch.cat(parts) for parts in zip(*drawn, strict=True))
        with patch.multiple(jarvis, draw_blocks=lambda *_: blocks, _PLAIN=0.0):
            return super().prepare(step)


def aligner_of(model: nn.Module, objective: str = "contrastive", targets: str = HEADS, **keys: object) -> Aligner:
    """Makes an Aligner for a model that no engine has wrapped yet."""
    given = {"ross": f"{__name__}:GivenRoss", "jarvis": f"{__name__}:GivenJarvis"}
    teacher = autoencoder_folder() if objective == "ross" else teacher_folder()
    objective = given.get(objective, objective)
    named = {"heads": targets} if "H" in targets else {"layers": targets, "granularity": "layer"}
    keys = {"memory": 0} | keys
    config = HeraConfig(objective=objective, weight=1.0, k=K, teacher=teacher, **named, **keys)
    return Aligner(model, config, image_processor=student_processor())


def loss_of(
    aligner: Aligner, forward: Callable[..., Any], batch: Batch, weights: tuple[float, float], precision: str = "fp32"
) -> Tensor:
    """Returns the weighted sum of both losses of a micro-batch; ``forward`` runs the model."""
    micro_batch = aligner.prepare({**batch.inputs, **batch.teacher})
    parameters, products = PRECISIONS[precision]
    inputs = {
        name: value.to(parameters) if value.is_floating_point() else value for name, value in batch.inputs.items()
    }
    with torch.autocast("cpu", products, enabled=parameters != products):
        lm_loss = forward(**inputs).loss
    return weights[0] * lm_loss + weights[1] * aligner.loss(micro_batch)


def cached_losses(
    aligner: Aligner,
    forward: Callable[..., object],
    micro_batches: list[Batch],
    weights: tuple[float, float],
    repeat: bool = True,
) -> Iterator[Tensor]:
    """Yields the weighted loss of each micro-batch; without ``repeat``, the second pass draws other random numbers."""
    restores = []
    for batch in micro_batches:
        restores.append(keep_random_state(torch.device("cpu")))
        micro_batch = aligner.prepare({**batch.inputs, **batch.teacher})
        with torch.no_grad():
            forward(**batch.inputs)
        aligner.collect(micro_batch)
    aligner.solve(weights[1])  # the configured weight is 1, so this weight also scales the objective's gradients
    for batch, restore in zip(micro_batches, restores, strict=True):
        if repeat:
            restore()
        yield loss_of(aligner, forward, batch, weights) / len(micro_batches)


def take_objective_gradients(aligner: Aligner) -> dict[str, Tensor]:
    """Returns the gradients of the objective's parameters (0 if a parameter has none), and clears them."""
    aligner.optimizer.reduce_gradients()
    found = {}
    for name, parameter in aligner.objective.named_parameters():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def reference(
    model: nn.Module, batch: Batch, objective: str = "contrastive", targets: str = HEADS, precision: str = "fp32"
) -> dict[str, dict[str, Tensor]]:
    """Returns the gradients of one process with the global batch, by loss and parameter name."""
    aligner = aligner_of(model, objective, targets)
    found = {}
    for name, weights in LOSSES.items():
        loss_of(aligner, model, batch, weights, precision).backward()
        aligner.after_backward()
        found[name] = {
            key: p.new_zeros(p.shape) if p.grad is None else p.grad.clone()
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        found[name] |= take_objective_gradients(aligner)
        model.zero_grad(set_to_none=True)
    aligner.capture.remove()
    return found


def gradients(
    engine_name: str,
    tuning: str,
    checkpointing: str,
    data: tuple[str, ...],
    n_micro: int = 1,
    objective: str = "contrastive",
    targets: str = HEADS,
    precision: str = "fp32",
) -> Gradients:
    """Returns an engine's unsharded gradients; ranks other than 0 return only the objective's gradients."""
    model = build(tuning, checkpointing, dtype=PRECISIONS[precision][0])
    aligner = aligner_of(model, objective, targets)
    engine = ENGINES[engine_name](model, n_micro)
    found: Gradients = {}
    for case in data:
        start = dist.get_rank() * n_micro
        mine = batches(case, n_micro)[1][start : start + n_micro]
        found[case] = {}
        for name, weights in LOSSES.items():
            if n_micro == 1:
                losses = iter([loss_of(aligner, engine.forward, mine[0], weights, precision)])
            else:
                losses = cached_losses(aligner, engine.forward, mine, weights)
            for loss in losses:
                engine.backward(loss)
                aligner.after_backward()
            unsharded = engine.gradients()
            found[case][name] = unsharded if dist.get_rank() == 0 else {}
            found[case][name] |= take_objective_gradients(aligner)
            engine.clear()
    return found
