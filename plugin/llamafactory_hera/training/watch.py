"""Detects a term that silently has no effect, and collects the statistics of a run on the device."""

import logging
import math
from typing import Any

import torch
from torch import Tensor

from ..config import HeraConfig
from ..distributed import rank
from ..heads import Targets
from ..heads.tokens import IGNORE_INDEX, token_mask
from ..objectives import Objective
from .checks import idle_message
from .term import TermOutput

logger = logging.getLogger("llamafactory_hera")

_IDLE_BATCHES = 10  # a run warns if no sample entered the loss in this many micro-batches from its start


class Watch:
    """Watches the steps of a run for faults that would otherwise go unnoticed, and collects its statistics.

    Until the first gradient arrives, the CPU waits for the device in every step, to catch a misconfiguration early.
    After that, counters stay on the device, and the CPU waits only when a line is logged.
    """

    def __init__(self, config: HeraConfig, targets: Targets, objective: Objective, device: torch.device) -> None:
        self.statistics = RunningMeans()
        #: True once a gradient has arrived at the targets; from then on, steps do not wait for the device.
        self.gradient_checked = config.weight == 0
        #: A boolean scalar, true if a term since the last optimizer step was not finite; None without a term.
        self.left_out: Tensor | None = None
        self._config, self._targets, self._objective = config, targets, objective
        self._batch_checked = self._gradient_due = self._entered = self._gradient_expected = False
        self._idle_batches: int | None = 0  # None once a sample has entered the loss
        self._nan_in_a_row = self._most_nan = torch.zeros((), dtype=torch.long, device=device)
        self._was_finite = torch.zeros((), dtype=torch.bool, device=device)
        self._broken = torch.zeros(len(targets.items), dtype=torch.bool, device=device)

    # -- before the first forward pass -----------------------------------------------------------------------------

    def check_batch(self, batch: dict[str, Any], has_image: Tensor, media_token_ids: frozenset[int]) -> None:
        """Raises ``ValueError`` if the collator labels prompts or drops images in the first batch with images."""
        if self._batch_checked or not media_token_ids or not bool(has_image.any()):
            return
        self._batch_checked = True
        ids, attention_mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        text = token_mask("text", ids, attention_mask, media_token_ids=media_token_ids)[has_image]
        media = token_mask("mean", ids, attention_mask)[has_image] & ~text
        lack = None
        if not media.any():
            lack = "their input_ids contain no image token: the collator drops the images, or truncation cut them off"
        elif not any(name.startswith("pixel_values") for name in batch):
            lack = f"the batch contains no pixel_values (only {', '.join(batch)}), so the model would not see them"
        if lack is not None:
            raise ValueError(
                f"data_collator: {len(text)} samples of the first batch have images, but {lack}. Pass the images to "
                "the collator (remove_unused_columns=False, a processor), or raise the maximum length of a sample."
            )
        if self._config.pooling == "answer" and labels is not None:
            labeled = labels[has_image] != IGNORE_INDEX
            # Text before an image is a prompt. In stage 1, a caption follows the image, so labeling all text is right.
            before_image = text & (media.cumsum(dim=1) == 0)
            if labeled[text].all() and before_image.any():
                raise ValueError(
                    "hera_pooling: answer averages over the labeled tokens, but in the first batch all text is "
                    "labeled, including the text before the image. Label the answers only (-100 elsewhere), or set "
                    "hera_pooling: text to average over all text."
                )

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def record(self, output: TermOutput, planned: bool = False) -> None:
        """Adds a term to the statistics; a batch whose samples the objective ``planned`` never counts as empty."""
        finite, entered = output.finite, output.n_samples > 0
        self._was_finite = self._was_finite | finite
        self.left_out = ~finite if self.left_out is None else self.left_out | ~finite
        self._nan_in_a_row = torch.where(finite, 0, self._nan_in_a_row + 1)
        self._most_nan = torch.maximum(self._most_nan, self._nan_in_a_row)
        self._broken = torch.where(finite, self._broken, output.broken)
        self.statistics.add(hera_loss=torch.where(output.comparable, output.loss.detach(), math.nan))
        if output.mknn is not None and output.chance is not None:
            self.statistics.add(hera_mknn=output.mknn.mean(), hera_mknn_chance=output.chance)
        self.statistics.count(hera_duplicates=torch.where(finite, output.n_duplicates, 0), hera_nan_batches=~finite)
        if not planned:
            self.statistics.count(hera_empty_batches=finite & ~entered)
        if not self.gradient_checked:
            self.sync()
            self._gradient_expected, self._entered = bool(output.gradient_expected), bool(entered & finite)
            if self._entered:
                self._idle_batches = None
            elif self._idle_batches is not None and not planned and finite:
                self._idle_batches += 1
                if self._idle_batches == _IDLE_BATCHES:
                    self._warn_of_idleness()

    def before_backward(self, representations: Tensor, valid: Tensor) -> None:
        """Records whether the backward pass must reach the targets; raises ``RuntimeError`` if it cannot."""
        if self.gradient_checked:
            return
        if self._entered and not representations.requires_grad:
            raise RuntimeError(idle_message(self._targets, "their outputs carry no gradient in this setup"))
        # without images on this process, the gradient is zero
        self._gradient_due = self._gradient_expected and bool(valid.any())

    def after_backward(self, gradient_seen: bool, n_steps: int) -> None:
        """Raises ``RuntimeError`` if the first backward pass after ``silent_steps`` did not reach the targets."""
        if self.gradient_checked or not self._gradient_due:
            return
        if gradient_seen:
            self.gradient_checked = True
        elif n_steps >= self._objective.silent_steps:
            raise RuntimeError(idle_message(self._targets, "the first backward pass brought them no gradient"))

    # -- log lines -------------------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Reads the counters; raises ``RuntimeError`` if ``hera_max_nan`` consecutive terms were not finite."""
        if (in_a_row := int(self._most_nan)) < self._config.max_nan:
            return
        where = ", ".join(name for name, bad in zip(self._targets.names, self._broken.tolist(), strict=True) if bad)
        remedy = "Lower the learning rate, or train in bf16 or fp32 instead of fp16"
        if not self._was_finite.item():
            remedy = "No term was finite: the model's weights may be NaN or exceed fp16's range; use other weights"
        if not where:
            where, remedy = "the teacher's features", "Check the teacher's weights and the images"
        raise RuntimeError(
            f"The HeRA term was not finite in {in_a_row} consecutive micro-batches (hera_max_nan), because of "
            f"{where}. {remedy}."
        )

    def close(self) -> None:
        """Reads the counters a last time, and warns if the term never had an effect."""
        self.sync()
        self._warn_of_idleness()

    def _warn_of_idleness(self) -> None:
        if not self._idle_batches or rank() > 0 or self._config.weight == 0:
            return
        why = f"no batch had {self._objective.least_samples} samples with an image"
        remedy = "Mix in more samples with images, or use a larger batch"
        if self._config.reads("hera_memory"):
            why = "no sample with an image could be compared with a sample that shows a different image"
            remedy += f", or set hera_memory: {4 * self._config.k}"
        logger.warning(f"The HeRA term was 0 in all {self._idle_batches} micro-batches so far: {why}. {remedy}.")


class RunningMeans:
    """The means of step statistics between two log lines, ignoring NaN; the sums stay on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._n_values: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Adds scalar tensors to the means with the same names."""
        for name, value in values.items():
            known = ~torch.isnan(value)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(known, value, 0.0).double()
            self._n_values[name] = self._n_values.get(name, 0) + known

    def count(self, **increments: Tensor) -> None:
        """Adds to counters; a counter that stays 0 is not reported."""
        for name, increment in increments.items():
            self._counts[name] = self._counts.get(name, 0) + increment.long()

    def take(self) -> dict[str, float]:
        """Returns means and counts since the last call; a mean without values is NaN."""
        # 0 / 0 is NaN on the device
        means = {name: (total / self._n_values[name]).item() for name, total in self._sums.items()}
        counts = {name: float(n) for name, value in self._counts.items() if (n := int(value))}
        self._sums, self._n_values, self._counts = {}, {}, {}
        return means | counts
