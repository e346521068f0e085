"""The comparison of two sets of gradients."""

from functools import cache

from torch import Tensor

from .cells import reference
from .tiny import HEADS, batches, build

BOUND = 1e-5
#: A reference below this share of the model's largest gradient is zero except for rounding, like the HeRA gradient of
#: o_proj's bias. Its error is relative to the largest gradient of the model.
ZERO = 1e-6


@cache
def expected_gradients(
    tuning: str, data: str, objective: str = "contrastive", targets: str = HEADS
) -> dict[str, dict[str, Tensor]]:
    """Returns gradients of one process with the global batch, without checkpointing, by loss and parameter name."""
    return reference(build(tuning, "off"), batches(data)[0], objective, targets)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the worst parameter's error: its largest difference divided by its largest gradient."""
    assert found.keys() == expected.keys()
    scales = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    largest = max(scales.values())
    worst = 0.0
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).abs().max())
        scale = scales[name] if scales[name] > ZERO * largest else largest
        worst = max(worst, difference / scale if difference else 0.0)
    return worst
