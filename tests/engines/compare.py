"""Compares two sets of gradients."""

from functools import cache

from torch import Tensor

from .cells import PRECISIONS, reference
from .tiny import HEADS, batches, build

BOUND = 1e-5
#: A reference below this share of the model's largest gradient is zero except for rounding, like the HeRA gradient of
#: o_proj's bias. The error of such a reference is relative to the model's largest gradient.
ZERO = 1e-6
#: The same two values for bf16 and autocast, where numbers have only eight significant bits.
HALF_BOUND, HALF_ZERO = 0.1, 2e-2


@cache
def expected_gradients(
    tuning: str, data: str, objective: str = "contrastive", targets: str = HEADS, precision: str = "fp32"
) -> dict[str, dict[str, Tensor]]:
    """Returns the gradients of one process with the global batch and no checkpointing, by loss and parameter name."""
    model = build(tuning, "off", dtype=PRECISIONS[precision][0])
    return reference(model, batches(data)[0], objective, targets, precision)


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor], zero: float = ZERO) -> float:
    """Returns the worst parameter's error: its largest difference divided by its largest gradient."""
    assert found.keys() == expected.keys()
    scales = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    largest = max(scales.values())
    worst = 0.0
    for name, tensor in expected.items():
        difference = float((found[name] - tensor).abs().max())
        scale = scales[name] if scales[name] > zero * largest else largest
        worst = max(worst, difference / scale if difference else 0.0)
    return worst
