"""What the ranks are asked to do: picklable functions that run on each of them."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import Targets
from llamafactory_hera.heads.families import decoder_layers
from tests.terms import ContrastiveTerm

from .engines import ENGINES
from .step import LOSSES, Step
from .tiny import HEAD_DIM, HEADS, Batch, K, batches, build

#: By data, loss and parameter name.
Gradients = dict[str, dict[str, dict[str, Tensor]]]

TAU = "log_temperature"


def reference(
    model: nn.Module, batch: Batch, objective: str = "contrastive", sites: str = HEADS
) -> dict[str, dict[str, Tensor]]:
    """Gradients by loss and parameter name, on one process with the global batch."""
    step = Step(model, objective=objective, sites=sites)
    found = {}
    for name, weights in LOSSES.items():
        step.loss(model, batch, weights).backward()
        step.capture.pool(None)
        found[name] = {
            key: p.new_zeros(p.shape) if p.grad is None else p.grad.clone()
            for key, p in model.named_parameters()
            if p.requires_grad
        }
        found[name] |= step.take_own_gradients()
        model.zero_grad(set_to_none=True)
    step.capture.remove()
    return found


def sliced_reference(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Gradients of the HeRA term alone by name, its heads read by slicing the weight of a plain or LoRA ``o_proj``."""
    heads = Targets.parse(HEADS).heads
    layers = decoder_layers(model)
    mask = batch.inputs["labels"] != -100
    read: dict[int, Tensor] = {}
    hooks = []
    for index in {head.layer for head in heads}:
        projection = layers[index].self_attn.o_proj

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], index: int = index) -> None:
            read[index] = (inputs[0] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

        hooks.append(projection.register_forward_pre_hook(keep))
    model(**batch.inputs)
    contributions = []
    for layer, head in heads:
        projection = layers[layer].self_attn.o_proj
        weight = projection.weight
        if hasattr(projection, "lora_A"):
            a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
            weight = weight + projection.scaling["default"] * b @ a
        part = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        contributions.append(read[layer][:, part] @ weight[:, part].T)
    output = ContrastiveTerm(K)(torch.stack(contributions), batch.teacher, batch.valid, torch.tensor(0.07))
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    return {
        name: p.new_zeros(p.shape) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def gradients(
    engine_name: str,
    tuning: str,
    checkpointing: str,
    data: tuple[str, ...],
    n_micro: int = 1,
    objective: str = "contrastive",
    sites: str = HEADS,
) -> Gradients:
    """Whole gradients through an engine; ranks other than the first give those of the objective's parameters alone.

    With several micro-batches a rank, they are accumulated under gradient caching.
    """
    model = build(tuning, checkpointing)
    step = Step(model, objective=objective, sites=sites)
    engine = ENGINES[engine_name](model, n_micro)
    found: Gradients = {}
    for case in data:
        start = dist.get_rank() * n_micro
        mine = batches(case, n_micro)[1][start : start + n_micro]
        found[case] = {}
        for name, weights in LOSSES.items():
            if n_micro == 1:
                losses = [step.loss(engine.forward, mine[0], weights)]
            else:
                losses = step.cached_losses(engine.forward, mine, weights)
            for loss in losses:
                engine.backward(loss)
                step.capture.pool(None)
            whole = engine.gradients()
            found[case][name] = whole if dist.get_rank() == 0 else {}
            found[case][name] |= step.take_own_gradients()
            engine.clear()
    return found


def remembered(size: int) -> dict[str, Tensor]:
    """What the memory holds after a batch with images, one with text alone on a rank, and one without any image."""
    model = build("full", "off")
    step = Step(model, CrossBatchMemory(size))
    for data in ("images", "one rank without", "text only"):
        whole, parts = batches(data)
        batch = parts[dist.get_rank()] if dist.is_initialized() else whole
        step.loss(model, batch, LOSSES["hera"])
        step.capture.pool(None)
    return step.term.memory.state_dict()
