"""One training step of ``L_LM + weight * L_HeRA``, the same code on one process and on several."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture
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

    def loss(self, forward: Callable[..., object], batch: Batch, weights: tuple[float, float]) -> Tensor:
        """The weighted sum, with the forward pass through ``forward``."""
        mask = batch.inputs["labels"] != -100
        self.capture.install()
        self.capture.pool(mask)
        lm_loss = forward(**batch.inputs).loss
        output = self.term(self.capture.representations(), batch.teacher, batch.valid, self.temperature())
        assert output.finite
        return weights[0] * lm_loss + weights[1] * output.loss

    def take_temperature_gradient(self) -> Tensor:
        """The gradient of log tau, then forgotten; 0 where there is none."""
        gradient = self.temperature.log_value.grad
        self.temperature.log_value.grad = None
        return torch.zeros(()) if gradient is None else gradient
