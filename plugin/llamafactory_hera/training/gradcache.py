"""Gradient caching: the term over all micro-batches of an optimizer step (Gao et al. 2021, arXiv 2101.06983).

A first pass without a graph collects the representations of every micro-batch. The loss over all of them yields a
gradient for each representation. Then every micro-batch runs again, with a graph, and receives its part of that
gradient (their sec. 3). This costs a second forward pass, but no memory beyond one micro-batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .term import HeraTerm, TermOutput

# above the noise of nondeterministic kernels in half precision, and below the effect of a different dropout mask
_TOLERANCE = 0.05


class GradientCache:
    """The micro-batches of one optimizer step, collected, solved together, and taken one by one."""

    def __init__(self) -> None:
        self.clear()
        self._difference: Tensor | None = None  # the largest difference between a micro-batch's two passes

    def __len__(self) -> int:
        """Returns the number of micro-batches that must still run with a graph."""
        return len(self._waiting)

    def clear(self) -> None:
        """Drops the micro-batches, for instance those of an interrupted step."""
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, representations: Tensor, teacher: Tensor, valid: Tensor, keys: Tensor) -> None:
        """Adds a micro-batch of this process, with the arguments of ``HeraTerm``."""
        self._waiting.append((representations.detach().float().requires_grad_(), teacher, valid, keys))

    def solve(self, term: HeraTerm, weight: float, scale: float | Tensor, batch_size: int | None) -> TermOutput:
        """Computes ``weight * L_HeRA`` over all micro-batches of all processes; ``scale`` is the loss scale."""
        self._n_batches = len(self._waiting)
        representations, teacher, valid, keys = zip(*self._waiting, strict=True)
        n_rows = batch_size and batch_size * self._n_batches
        output = term(torch.cat(representations, dim=1), torch.cat(teacher), torch.cat(valid), n_rows, torch.cat(keys))
        loss = weight * output.loss
        loss.backward()
        for parameter in term.objective.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self._value, self._finite = loss.detach(), output.finite
        return output

    def take(self, representations: Tensor) -> Tensor:
        """Returns the weighted term of the next micro-batch, which has just run again with a graph.

        The result is a surrogate: its mean over the micro-batches has the value and the gradient of the step's term.
        The gradient is computed from the first pass; ``check`` refuses a second pass with other representations.
        """
        first, _, valid, _ = self._waiting.pop(0)
        assert first.grad is not None
        valid = (valid & self._finite).view(1, -1, 1)
        # torch.where instead of a product with the mask: a non-finite value outside the mask must not spread
        rows = torch.where(valid, representations.float(), 0.0)
        expected = torch.where(valid, first.detach(), 0.0)
        difference = (rows.detach() - expected).norm() / expected.norm()
        # fmax ignores the NaN of a micro-batch that has no images or is not finite
        self._difference = difference if self._difference is None else torch.fmax(self._difference, difference)
        product = self._n_batches * (rows * first.grad).sum()
        return product - product.detach() + self._value

    def check(self) -> None:
        """Raises ``RuntimeError`` if the two passes of a micro-batch differ; the CPU waits for the device here."""
        if self._difference is not None and (difference := float(self._difference)) > _TOLERANCE:
            raise RuntimeError(
                f"hera_accumulate: gradcache runs each micro-batch twice, but the outputs of the two passes differ by "
                f"{difference:.0%}, because this model draws new random numbers in the second pass. Set "
                "hera_accumulate: none instead."
            )


def keep_random_state(device: torch.device) -> Callable[[], None]:
    """Saves the random states that a forward pass uses, and returns a function that restores them."""
    on_cpu = torch.get_rng_state()
    on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(on_cpu)
        if on_device is not None:
            torch.get_device_module(device).set_rng_state(on_device, device)

    return restore
