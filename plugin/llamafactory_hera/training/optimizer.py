"""The parameters that an objective trains beside the model: temperature, projectors; replicated on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..alignment.gather import world_size
from ..objectives.base import Objective

_VALUES, _OPTIMIZER = "objective.", "optimizer."


class ObjectiveOptimizer:
    """Trains an objective's parameters by an AdamW of their own, without weight decay.

    They are kept apart from the model, so that neither the saved model nor a sharding engine knows of them. Every rank
    steps its own replica with the average of all ranks' gradients: where each rank computes the loss of its own
    samples, that is the gradient of the global batch; where each computes the loss of the global batch, the gradients
    differ in rounding alone, which AdamW would still blow up to whole steps where a gradient is zero but for rounding.
    """

    def __init__(self, objective: Objective) -> None:
        self._parameters = dict(objective.named_parameters())
        self._trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        trained = self._trained.values()
        # fused: it asks the device, not the host, whether to step, and counts steps there
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True) if trained else None

    def step(self, learning_rate: float, scale: float | Tensor = 1.0, skip: Tensor | None = None) -> None:
        """One optimizer step, then forgets the gradients; every rank must call it.

        The factor ``scale`` of a gradient scaler is divided out first. Without a finite gradient there is no step, nor
        where the boolean scalar ``skip`` is true; the host does not wait to be told.
        """
        if self._optimizer is None:
            return
        self.reduce_gradients()
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
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
        """Averages the gradients over the ranks; every rank must call it."""
        if world_size() == 1:
            return
        for parameter in self._trained.values():
            if parameter.grad is not None:  # a term is left out on every rank or on none
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(world_size())

    def state(self) -> dict[str, Tensor]:
        """Values and optimizer state as flat tensors, copies."""
        state = {_VALUES + name: p.detach().clone() for name, p in self._parameters.items()}
        if self._optimizer is not None:
            for name, parameter in self._trained.items():
                for slot, value in self._optimizer.state.get(parameter, {}).items():
                    state[f"{_OPTIMIZER}{name}.{slot}"] = value.clone()
        return state

    def load_values(self, values: dict[str, Tensor]) -> None:
        """Takes the values of another run's :meth:`state`, which must be of the same objective; not its optimizer."""
        found = {name.removeprefix(_VALUES): t for name, t in values.items() if name.startswith(_VALUES)}
        found = {name: t for name, t in found.items() if name in self._trained or name not in self._parameters}
        shapes, expected = ({name: t.shape for name, t in held.items()} for held in (found, self._trained))
        first = next((name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)), None)
        if first is not None:
            raise ValueError(
                f"hera_own_from: its {first} is not that of this run ({list(expected.get(first, ()))}); give a run of "
                "the same objective on as many targets of this model."
            )
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(found[name])

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what :meth:`state` gave."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[_VALUES + name])
        if self._optimizer is None:
            return
        for name, parameter in self._trained.items():
            prefix = f"{_OPTIMIZER}{name}."
            slots = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            # copies, because the optimizer works in place
            self._optimizer.state[parameter] = {slot: t.to(parameter.device, copy=True) for slot, t in slots.items()}
