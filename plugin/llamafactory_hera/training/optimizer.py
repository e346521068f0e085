"""The optimizer of the objective's parameters (temperature, projectors), which every process replicates."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import world_size
from ..objectives.base import Objective

_VALUES, _OPTIMIZER = "objective.", "optimizer."


class ObjectiveOptimizer:
    """Trains the objective's parameters with a separate AdamW optimizer, without weight decay.

    Every process updates its replica with the average of all gradients. If each process computes the loss of its own
    samples, the average is the gradient of the global batch. If all compute the loss of the global batch, their
    gradients differ only by rounding, but AdamW would turn near-zero gradients into different full steps.
    """

    def __init__(self, objective: Objective) -> None:
        self._parameters = dict(objective.named_parameters())
        parameters = self._parameters.values()
        # the fused optimizer decides on the device whether to update, and counts its updates there
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True) if parameters else None

    def step(self, learning_rate: float, scale: float | Tensor = 1.0, skip: Tensor | None = None) -> None:
        """Divides the gradients by ``scale``, steps if all are finite and ``skip`` is false, and clears them."""
        if self._optimizer is None:
            return
        self.reduce_gradients()
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if isinstance(scale, Tensor) or scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1 / scale)
        if gradients:
            finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
            left_out = ~finite if skip is None else ~finite | skip
            self._optimizer.param_groups[0]["lr"] = learning_rate
            self._optimizer.found_inf = left_out.float()  # type: ignore[attr-defined]
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def reduce_gradients(self) -> None:
        """Averages the gradients across processes; every process must call it."""
        if world_size() == 1:
            return
        for parameter in self._parameters.values():
            if parameter.grad is not None:  # on all processes or on none
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size())

    def state(self) -> dict[str, Tensor]:
        """Returns copies of the parameters and the optimizer state by name."""
        state = {_VALUES + name: p.detach().clone() for name, p in self._parameters.items()}
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                for slot, value in self._optimizer.state.get(parameter, {}).items():
                    state[f"{_OPTIMIZER}{name}.{slot}"] = value.clone()
        return state

    def load_values(self, values: dict[str, Tensor]) -> None:
        """Loads the parameters of another run's ``state``; raises ``ValueError`` if names or shapes differ."""
        found = {name.removeprefix(_VALUES): t for name, t in values.items() if name.startswith(_VALUES)}
        shapes = [{name: t.shape for name, t in tensors.items()} for tensors in (self._parameters, found)]
        for name in {**shapes[0], **shapes[1]}:
            if shapes[0].get(name) != shapes[1].get(name):
                raise ValueError(
                    f"hera_objective_from: {name} does not have the shape that this run needs; give a run with the "
                    "same objective, the same model and the same number of targets."
                )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(found[name])

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores the result of ``state``."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[_VALUES + name])
        if self._optimizer is None:
            return
        for name, parameter in self._parameters.items():
            prefix = f"{_OPTIMIZER}{name}."
            slots = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            # copies, because the optimizer changes them in place
            self._optimizer.state[parameter] = {slot: t.to(parameter.device, copy=True) for slot, t in slots.items()}
