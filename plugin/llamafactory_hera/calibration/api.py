"""Calibration as a function of a recipe; the command line calls it."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .control import Control


def calibrate(
    recipe: str | os.PathLike, overrides: Sequence[str] = (), control: "Control | None" = None
) -> list[dict[str, Any]]:
    """Calibrates the model of a recipe and writes adapter, ``calibration.json`` and ``calibration.png``.

    Args:
        recipe: A recipe of the host; its model, dataset, template and ``rah_*`` keys are used, and ``output_dir``.
        overrides: ``key=value`` s over the recipe, for instance ``rah_delta=0.02``.
        control: Calibrate on corrupted data, too, into ``output_dir/control_<name>``: ``shuffled`` images, or
            ``blank`` ones.

    Returns:
        The content of ``calibration.json``; with a control that of the corrupted calibration behind it.

    Raises:
        ValueError: Bad input; names the key, the value and the remedy.
    """
    from ..integrations.llamafactory.calibration import read_calibration
    from .run import calibrate_heads

    read = read_calibration(recipe, overrides)
    return calibrate_heads(read.material, read.settings, read.output_dir, control)
