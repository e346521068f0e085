"""The learned softmax temperature: one scalar in log scale, replicated on every rank."""

import math

import torch
from torch import Tensor, nn


class Temperature(nn.Module):
    """``tau = exp(log_tau)``, trained by an AdamW of its own without weight decay.

    It is kept apart from the model, so that neither the saved model nor a sharding engine knows of it. Every rank
    computes the loss of the global batch, so every rank holds the same gradient and no reduction is needed.

    Args:
        initial: Starting value, above 0.
        learned: False keeps it fixed.
    """

    def __init__(self, initial: float, learned: bool = True) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor(math.log(initial)), requires_grad=learned)
        self._optimizer = torch.optim.AdamW([self.log_value], lr=0.0, weight_decay=0.0) if learned else None

    def forward(self) -> Tensor:
        """The temperature, with gradient while it is learned."""
        return self.log_value.exp()

    @property
    def value(self) -> float:
        """The temperature as a number."""
        return math.exp(self.log_value.item())

    def step(self, learning_rate: float) -> None:
        """One optimizer step with the run's current learning rate, then forgets the gradient."""
        if self._optimizer is None or self.log_value.grad is None:
            return
        if torch.isfinite(self.log_value.grad):
            self._optimizer.param_groups[0]["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Value and optimizer state as flat tensors, copies."""
        state = {"temperature.log_value": self.log_value.detach().clone()}
        if self._optimizer is not None:
            for name, value in self._optimizer.state.get(self.log_value, {}).items():
                state[f"temperature.optimizer.{name}"] = value.clone()
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave."""
        with torch.no_grad():
            self.log_value.copy_(state["temperature.log_value"])
        prefix = "temperature.optimizer."
        restored = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if self._optimizer is not None:
            # the step count stays on the CPU, as torch.optim keeps it; copies, because the optimizer works in place
            self._optimizer.state[self.log_value] = {
                name: t.to("cpu" if name == "step" else self.log_value.device, copy=True)
                for name, t in restored.items()
            }
