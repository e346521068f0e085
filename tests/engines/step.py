"""One training step of ``L_LM + weight * L_HeRA``, the same code on one process and on several."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture
from llamafactory_hera.training.gradcache import GradientCache
from llamafactory_hera.training.random_state import RandomState
from llamafactory_hera.training.temperature import Temperature
from llamafactory_hera.training.term import HeraTerm

from .tiny import HEADS, Batch, K

#: Weights of the LM loss and of the HeRA term. The LM loss is multiplied by 0, not left out: DDP wants every parameter
#: in the graph.
LOSSES = {"both": (1.0, 0.1), "hera": (0.0, 1.0)}


class Step:
    """Capture, term and temperature of one model.

    Args:
        model: The model before an engine wraps it.
        memory: Remembered pairs.
    """

    def __init__(self, model: nn.Module, memory: CrossBatchMemory | None = None) -> None:
        self.capture = HeadCapture(model, HEADS)
        self.term = HeraTerm(K, memory=memory)
        self.temperature = Temperature(0.07)

    def forward(self, forward: Callable[..., object], batch: Batch) -> tuple[Tensor, Tensor]:
        """The LM loss and the representations."""
        self.capture.install()
        self.capture.pool(batch.inputs["labels"] != -100)
        lm_loss = forward(**batch.inputs).loss
        return lm_loss, self.capture.representations()

    def loss(self, forward: Callable[..., object], batch: Batch, weights: tuple[float, float]) -> Tensor:
        """The weighted sum, with the forward pass through ``forward``."""
        lm_loss, representations = self.forward(forward, batch)
        output = self.term(representations, batch.teacher, batch.valid, self.temperature())
        assert output.finite
        return weights[0] * lm_loss + weights[1] * output.loss

    def cached_losses(
        self,
        forward: Callable[..., object],
        micro_batches: list[Batch],
        weights: tuple[float, float],
        repeat: bool = True,
    ) -> Iterator[Tensor]:
        """The weighted sum under gradient caching, one micro-batch after the other; their sum is the loss.

        Without ``repeat`` the second pass draws other random numbers than the first.
        """
        cache = GradientCache()
        states = []
        for batch in micro_batches:
            states.append(RandomState(torch.device("cpu")))
            with torch.no_grad():
                cache.add(self.forward(forward, batch)[1], batch.teacher, batch.valid)
            self.capture.pool(None)
        cache.solve(self.term, self.temperature, weights[1])
        for batch, state in zip(micro_batches, states, strict=True):
            if repeat:
                state.restore()
            lm_loss, representations = self.forward(forward, batch)
            yield (weights[0] * lm_loss + cache.take(representations)) / len(micro_batches)

    def take_temperature_gradient(self) -> Tensor:
        """The gradient of log tau, then forgotten; 0 where there is none."""
        gradient = self.temperature.log_value.grad
        self.temperature.log_value.grad = None
        return torch.zeros(()) if gradient is None else gradient
