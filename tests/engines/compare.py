"""When two sets of gradients are the same."""

from functools import cache

from torch import Tensor

from .cells import reference
from .tiny import HEADS, batches, build

BOUND = 1e-5
#: A reference below this share of the model's largest gradient is zero but for rounding (the HeRA gradient of the bias
#: of o_proj): it has no relative error, and counts against the largest gradient.
ZERO = 1e-6


@cache
def expected_gradients(
    tuning: str, data: str, objective: str = "contrastive", targets: str = HEADS
) -> dict[str, dict[str, Tensor]]:
    """Those of one process with the global batch and without checkpointing, by loss and parameter name."""
    return reference(build(tuning, "off"), batches(data)[0], objective, targets)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over parameters of the largest difference, relative to the parameter's largest gradient."""
    assert found.keys() == expected.keys()
    scales = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    largest = max(scales.values())
    worst = 0.0
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).abs().max())
        scale = scales[name] if scales[name] > ZERO * largest else largest
        worst = max(worst, difference / scale if difference else 0.0)
    return worst
