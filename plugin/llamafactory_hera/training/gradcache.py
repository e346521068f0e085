"""The HeRA loss of all micro-batches of an optimizer step at once: gradient caching (Gao et al. 2021).

Under gradient accumulation a contrastive loss sees one micro-batch at a time. Gradient caching (arXiv 2101.06983,
sec. 3) makes it exact: a first pass without a graph collects the representations of every micro-batch; the loss of all
of them gives its gradient at each representation; then every micro-batch runs again, with a graph, and is handed its
part of that gradient. The price is one more forward pass; the memory stays that of a micro-batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .term import HeraTerm, TermOutput

# Larger than what kernels that are not deterministic do in half precision, smaller than what other dropout does.
_TOLERANCE = 0.05


class GradientCache:
    """The micro-batches of one optimizer step, in order: added, solved together, taken out one by one."""

    def __init__(self) -> None:
        self.clear()
        self._value, self._sound = torch.zeros(()), torch.ones((), dtype=torch.bool)
        self._difference: Tensor | None = None  # the largest one between two passes of a micro-batch

    def __len__(self) -> int:
        """Micro-batches that are still to be run with a graph."""
        return len(self._waiting)

    def clear(self) -> None:
        """Forgets the micro-batches, those of a step cut short."""
        self._waiting: list[Tensor] = []
        self._teacher: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._n_batches = 0

    def add(self, representations: Tensor, teacher: Tensor, valid: Tensor) -> None:
        """Adds a micro-batch of this rank; arguments as for :class:`~.term.HeraTerm`."""
        self._waiting.append(representations.detach().float().requires_grad_())
        self._teacher.append(teacher)
        self._valid.append(valid)

    def solve(
        self, term: HeraTerm, weight: float, scale: float | Tensor = 1.0, batch_size: int | None = None
    ) -> TermOutput:
        """Computes ``weight * L_HeRA`` over the micro-batches of all ranks, each of which must call it.

        The objective gets its own gradient, times ``scale``: that of a gradient scaler, which is divided out later.
        No micro-batch of a rank is larger than ``batch_size``.
        """
        teacher, valid = torch.cat(self._teacher), torch.cat(self._valid)
        self._n_batches = len(self._waiting)
        n_rows = batch_size and batch_size * self._n_batches
        output = term(torch.cat(self._waiting, dim=1), teacher, valid, n_rows)
        loss = weight * output.loss
        loss.backward()
        for parameter in term.objective.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self._value, self._sound = loss.detach(), output.sound
        self._teacher = []
        return output

    def take(self, representations: Tensor) -> Tensor:
        """Stands for the weighted term in the next micro-batch, which has been run again with a graph.

        The mean over the micro-batches has the value and the gradient of the step's term. Representations other than
        those that were added :meth:`check` refuses: the gradient would belong to another forward pass.
        """
        first, valid = self._waiting.pop(0), (self._valid.pop(0) & self._sound).view(1, -1, 1)
        assert first.grad is not None
        # not a product with the mask: a non-finite value outside it must not spread
        rows = torch.where(valid, representations.float(), 0.0)
        expected = torch.where(valid, first.detach(), 0.0)
        difference = (rows.detach() - expected).norm() / expected.norm()
        # NaN, of a micro-batch without images or one that is not finite, is no difference
        self._difference = difference if self._difference is None else torch.fmax(self._difference, difference)
        product = self._n_batches * (rows * first.grad).sum()
        return product - product.detach() + self._value

    def check(self) -> None:
        """The host waits for the device here.

        Raises:
            RuntimeError: A micro-batch gave other representations in its second pass.
        """
        if self._difference is not None and (difference := float(self._difference)) > _TOLERANCE:
            raise RuntimeError(
                f"hera_accumulate: gradcache runs each micro-batch twice, and the second pass gave other outputs "
                f"({difference:.0%} off): something in this model is random and is not repeated. Set it to none."
            )


def keep_random_state(device: torch.device) -> Callable[[], None]:
    """Keeps the state of the generators that a forward pass draws from; what it returns sets them back."""
    cpu = torch.get_rng_state()
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(cpu)
        if own is not None:
            torch.get_device_module(device).set_rng_state(own, device)

    return restore
