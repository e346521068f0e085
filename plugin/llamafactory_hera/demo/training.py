"""One small training loop and the conditions under which it gives the same weights every time."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# Part of the result: sums are split by thread, so another number may give other last bits. These models are so small
# that a second thread gains little, and costs much when the other core is busy.
THREADS = 1


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Fix PyTorch's CPU seed and number of threads; both are as before afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def optimise(
    modules: list[torch.nn.Module],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> list[float]:
    """AdamW with a tenth of warm-up, cosine decay and gradient clipping at 1; the modules are in eval mode afterwards.

    Args:
        modules: What is trained.
        loss: Scalar loss of step ``i``.
        steps: Number of updates.
        learning_rate: Highest learning rate.

    Returns:
        The loss of every step.
    """
    for module in modules:
        module.train()
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses = []
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    for module in modules:
        module.eval()
    return losses
