"""The HeRA term of each micro-batch in the host's training loop: what lives as long as the run."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture, HeadSet
from llamafactory_hera.heads.families import media_token_ids, model_config
from llamafactory_hera.heads.pooling import token_mask
from llamafactory_hera.heads.upstream import trainable_upstream
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.training.gradcache import GradientCache
from llamafactory_hera.training.statistics import RunningMeans
from llamafactory_hera.training.temperature import Temperature
from llamafactory_hera.training.term import HeraTerm, TermOutput

from .arguments import HeraArguments
from .collator import CACHED, NO_IMAGE, PIXELS, PREFIX
from .state import RunState

logger = logging.getLogger("llamafactory.hera")  # a child of the host's logger, which has the handlers


#: Steps in a row from the start without any comparison, after which a run warns.
IDLE_STEPS = 10


class HeraStep:
    """Computes the weighted HeRA term of each micro-batch, and keeps teacher, capture, temperature and statistics.

    Args:
        model: The model before any engine wraps it.
        heads: The heads to align.
        arguments: The ``hera_*`` keys.
        device: Where the step runs.
        dtype: Compute dtype of the teacher.
    """

    def __init__(
        self, model: nn.Module, heads: HeadSet, arguments: HeraArguments, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.arguments = arguments
        self.heads = heads
        self.capture = HeadCapture(model, heads)
        self._check_not_idle(model)
        self.teacher = VisionTeacher.from_pretrained(arguments.hera_teacher, device=device, dtype=dtype)
        self.cache = None
        if arguments.hera_teacher_cache is not None:
            self.cache = FeatureCache(arguments.hera_teacher_cache, self.teacher.fingerprint, self.teacher.dim)
        self.memory = CrossBatchMemory(arguments.hera_memory)
        self.term = HeraTerm(arguments.hera_k, arguments.hera_similarity == "cosine", self.memory)
        self.temperature = Temperature(arguments.hera_temperature, not arguments.hera_fixed_temperature).to(device)
        self.state = RunState(heads, self.teacher.fingerprint, arguments, self.temperature, self.memory)
        self.statistics = RunningMeans()
        self._media_token_ids = media_token_ids(model_config(model))
        self.ahead = GradientCache()
        self._nan_in_a_row = 0
        self._n_samples = 0  # that entered the last term
        self._comparable = False  # its samples had candidates enough for a gradient
        self._gradient_checked = False
        self._gradient_due = False
        self._idle_steps: int | None = 0  # None once a sample has entered

    # -- one micro-batch -------------------------------------------------------------------------------------------

    @staticmethod
    def take_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Takes the teacher's tensors out of a batch, in place; empty for a batch of another collator."""
        return {name: inputs.pop(name) for name in list(inputs) if name.startswith(PREFIX)}

    def begin(self, inputs: dict[str, Any]) -> Tensor:
        """Names the tokens to pool before the forward pass; returns their mask ``[B, T]``."""
        mask = token_mask(
            self.arguments.hera_pooling,
            inputs["input_ids"],
            inputs.get("attention_mask"),
            inputs.get("labels"),
            self._media_token_ids,
        )
        self.capture.install()
        self.capture.watch_gradients = not self._gradient_checked
        self.capture.pool(mask)
        return mask

    def finish(self, mask: Tensor, teacher_inputs: dict[str, Tensor]) -> Tensor:
        """The weighted HeRA term of the forward pass just made; every rank must call it.

        Raises:
            RuntimeError: No head can carry a gradient, or too many non-finite terms in a row.
        """
        representations = self.capture.representations()
        valid = self._valid(mask, teacher_inputs)
        if len(self.ahead):
            term = self.ahead.take(representations)
        else:
            output = self.term(representations, self._teacher_features(teacher_inputs), valid, self.temperature())
            self._note(output)
            term = self.arguments.hera_weight * output.loss
        if self._n_samples and not self._gradient_checked and not representations.requires_grad:
            raise RuntimeError(self._idle_message("their outputs carry no gradient in this setup"))
        # a rank whose samples have no image gets a gradient of zero
        self._gradient_due = self._comparable and bool(valid.any())
        return term

    def collect(self, mask: Tensor, teacher_inputs: dict[str, Tensor]) -> None:
        """Adds the forward pass just made, without a graph, to those that :meth:`solve` takes together."""
        features = self._teacher_features(teacher_inputs)
        self.ahead.add(self.capture.representations(), features, self._valid(mask, teacher_inputs))
        self.capture.pool(None)

    def solve(self, scale: float) -> None:
        """Computes the term of the collected micro-batches; :meth:`finish` then hands out their parts.

        Args:
            scale: Factor of the loss scaler, 1 without one.
        """
        self._note(self.ahead.solve(self.term, self.temperature, self.arguments.hera_weight, scale))

    def end(self) -> None:
        """Called after the backward pass: stops pooling and, once, checks that gradient reached the heads.

        Raises:
            RuntimeError: The first backward pass with comparable samples left every head without gradient.
        """
        if not self._gradient_checked and self._gradient_due and self.arguments.hera_weight > 0:
            if not self.capture.gradient_seen:
                raise RuntimeError(self._idle_message("no gradient arrived at them in the first backward pass"))
            self._gradient_checked = True
        self.capture.pool(None)

    @staticmethod
    def _valid(mask: Tensor, teacher_inputs: dict[str, Tensor]) -> Tensor:
        return (teacher_inputs["hera_source"] != NO_IMAGE) & mask.any(dim=1)

    def _note(self, output: TermOutput) -> None:
        self._comparable = output.comparable
        if output.broken is not None:
            self._n_samples = 0
            self._count_non_finite(output.broken)
            return
        self._n_samples = output.n_samples
        self._nan_in_a_row = 0
        self._count_idle(output.n_samples)
        self.statistics.add(
            hera_loss=output.loss.detach(), hera_mknn=output.mknn.mean(), hera_mknn_chance=output.chance
        )
        self.statistics.count(hera_duplicates=output.n_duplicates)

    def _teacher_features(self, inputs: dict[str, Tensor]) -> Tensor:
        source = inputs["hera_source"]
        features = torch.zeros(source.shape[0], self.teacher.dim, device=source.device)
        if "hera_features" in inputs:
            features = torch.where((source == CACHED).unsqueeze(1), inputs["hera_features"].to(features), features)
        if "hera_pixels" in inputs:
            rows = source == PIXELS
            features[rows] = self._remember(inputs, rows, self.teacher.encode(inputs["hera_pixels"][rows]))
        return features

    def _remember(self, inputs: dict[str, Tensor], rows: Tensor, computed: Tensor) -> Tensor:
        """Caches features and returns them rounded as they will be read, so that a resumed run sees the same."""
        if self.cache is None:
            return computed
        keys = [bytes(key.tolist()) for key in inputs["hera_keys"][rows].cpu()]
        try:
            return self.cache.put(keys, computed.cpu()).to(computed)
        except OSError as error:
            self._drop_cache(error)
            return computed

    def flush_cache(self) -> None:
        """Writes the features that wait in memory; a cache that cannot be written is no reason to stop."""
        if self.cache is not None:
            try:
                self.cache.flush()
            except OSError as error:
                self._drop_cache(error)

    def _drop_cache(self, error: OSError) -> None:
        logger.warning(
            f"hera_teacher_cache: {self.arguments.hera_teacher_cache} cannot be written ({error}); the run goes on "
            "and computes the features that are not in it."
        )
        self.cache = None

    def _count_non_finite(self, broken: Tensor) -> None:
        self._nan_in_a_row += 1
        self.statistics.count(hera_nan_steps=1)
        if self._nan_in_a_row < self.arguments.hera_max_nan:
            return
        names = [str(head) for head, bad in zip(self.heads.heads, broken.tolist(), strict=True) if bad]
        if names:
            where, remedy = ", ".join(names), "Lower the learning rate, or train in bf16 or fp32 instead of fp16"
        else:
            where, remedy = "the teacher's features", "The teacher's weights or the images are broken"
        raise RuntimeError(
            f"The HeRA term was not finite in {self._nan_in_a_row} steps in a row (hera_max_nan), because of {where}. "
            f"{remedy}."
        )

    # -- never a silent no-op --------------------------------------------------------------------------------------

    def _count_idle(self, n_samples: int) -> None:
        if n_samples:
            self._idle_steps = None
        elif self._idle_steps is not None:
            self._idle_steps += 1
            if self._idle_steps == IDLE_STEPS:
                self.warn_when_idle()

    def warn_when_idle(self) -> None:
        """Warns when no sample of the run so far could be compared with another."""
        if self._idle_steps:
            logger.warning(
                f"The HeRA term was 0 in all {self._idle_steps} steps so far: no sample with an image had another "
                "one, with another image, to be compared with. Mix in more samples with images, use a larger batch, "
                f"or set hera_memory: {4 * self.arguments.hera_k}."
            )

    def _check_not_idle(self, model: nn.Module) -> None:
        layers = sorted({head.layer for head in self.heads.heads})
        if not any(trainable_upstream(model, layer) for layer in layers):
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            shown = ", ".join(trainable[:3]) or "nothing"
            raise ValueError(self._idle_message(f"nothing that feeds them is trained ({shown} … is)"))

    def _idle_message(self, why: str) -> str:
        return (
            f"hera_heads: the HeRA term cannot change {self.heads}: {why}. Train something before these heads "
            "(freeze_multi_modal_projector: false, freeze_language_model: false, or lora_target: all), or choose "
            "heads of later layers."
        )

    def logs(self) -> dict[str, float]:
        """The running statistics since the last call, equal on every rank but for rounding."""
        return {**self.statistics.take(), "hera_temperature": self.temperature.value}
