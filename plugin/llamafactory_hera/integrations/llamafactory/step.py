"""The alignment term of each micro-batch in the host's training loop: what lives as long as the run."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture, HeadSet, LayerCapture, Sites
from llamafactory_hera.heads.families import head_layout, media_token_ids, model_config
from llamafactory_hera.heads.pooling import token_mask
from llamafactory_hera.heads.upstream import trainable_upstream
from llamafactory_hera.objectives import Options, create, find
from llamafactory_hera.training.gradcache import GradientCache
from llamafactory_hera.training.own_parameters import OwnParameters
from llamafactory_hera.training.patch_term import PatchTerm
from llamafactory_hera.training.statistics import RunningMeans
from llamafactory_hera.training.term import HeraTerm, TermOutput

from .arguments import HeraArguments
from .collator import NO_IMAGE, PREFIX
from .state import RunState
from .teaching import Teaching
from .visual_tokens import grid_side, image_token_id, token_positions

logger = logging.getLogger("llamafactory.hera")  # a child of the host's logger, which has the handlers


#: Steps in a row from the start without any sample that entered, after which a run warns.
IDLE_STEPS = 10


class HeraStep:
    """Computes the weighted term of each micro-batch, and keeps teacher, capture, objective and statistics.

    Args:
        model: The model before any engine wraps it.
        sites: The heads or layers to align.
        arguments: The ``hera_*`` keys.
        device: Where the step runs.
        dtype: Compute dtype of the teacher.
        seed: Of what the objective draws.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        arguments: HeraArguments,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.arguments = arguments
        self.sites = sites
        self.capture = HeadCapture(model, sites) if isinstance(sites, HeadSet) else LayerCapture(model, sites)
        self._check_not_idle(model)
        config = model_config(model)
        view = find(arguments.hera_objective).view
        self.teaching = Teaching(arguments, view, device, dtype)
        options = Options(
            n_sites=len(sites.names),
            dim=head_layout(config).hidden_size,
            teacher_dim=self.teaching.teacher.dim,
            temperature=arguments.hera_temperature,
            learn_temperature=not arguments.hera_fixed_temperature,
        )
        self.objective = create(arguments.hera_objective, options, seed).to(device)
        self.memory = CrossBatchMemory(arguments.hera_memory)
        self.term: HeraTerm | PatchTerm
        if view == "patches":
            self._tokens = image_token_id(config), grid_side(config, arguments.hera_objective) ** 2
            self.term = PatchTerm(self.objective)
        else:
            self.term = HeraTerm(self.objective, arguments.hera_k, arguments.hera_similarity == "cosine", self.memory)
        self.own = OwnParameters(self.objective)
        self.state = RunState(
            sites, self.teaching.teacher.fingerprint, arguments, self.objective, self.own, self.memory
        )
        self.statistics = RunningMeans()
        self._media_token_ids = media_token_ids(config)
        self.ahead = GradientCache()
        self._nan_in_a_row = 0
        self._n_samples = 0  # that entered the last term
        self._comparable = False  # all of them must have a gradient
        self._gradient_checked = False
        self._gradient_due = False
        self._idle_steps: int | None = 0  # None once a sample has entered

    # -- one micro-batch -------------------------------------------------------------------------------------------

    @staticmethod
    def take_inputs(inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Takes the teacher's tensors out of a batch, in place; empty for a batch of another collator."""
        return {name: inputs.pop(name) for name in list(inputs) if name.startswith(PREFIX)}

    def begin(self, inputs: dict[str, Any], teacher_inputs: dict[str, Tensor]) -> Tensor:
        """Names the tokens to read before the forward pass; returns which samples can enter, boolean ``[B]``."""
        self.capture.install()
        self.capture.watch_gradients = not self._gradient_checked
        shown = teacher_inputs["hera_source"] != NO_IMAGE
        if self.objective.view == "patches":
            self.capture.tokens(
                token_positions(
                    inputs["input_ids"], inputs.get("attention_mask"), teacher_inputs["hera_image"], *self._tokens
                )
            )
            return shown
        mask = token_mask(
            self.arguments.hera_pooling,
            inputs["input_ids"],
            inputs.get("attention_mask"),
            inputs.get("labels"),
            self._media_token_ids,
        )
        self.capture.pool(mask)
        return shown & mask.any(dim=1)

    def finish(self, valid: Tensor, teacher_inputs: dict[str, Tensor]) -> Tensor:
        """The weighted term of the forward pass just made; every rank must call it.

        Raises:
            RuntimeError: Nothing that is aligned can carry a gradient, or too many non-finite terms in a row.
        """
        representations = self.capture.representations()
        if len(self.ahead):
            term = self.ahead.take(representations)
        else:
            output = self.term(representations, self.teaching.features(teacher_inputs), valid)
            self._note(output)
            term = self.arguments.hera_weight * output.loss
        if self._n_samples and not self._gradient_checked and not representations.requires_grad:
            raise RuntimeError(self._idle_message("their outputs carry no gradient in this setup"))
        # a rank whose samples have no image gets a gradient of zero
        self._gradient_due = self._comparable and bool(valid.any())
        return term

    def collect(self, valid: Tensor, teacher_inputs: dict[str, Tensor]) -> None:
        """Adds the forward pass just made, without a graph, to those that :meth:`solve` takes together."""
        self.ahead.add(self.capture.representations(), self.teaching.features(teacher_inputs), valid)
        self.capture.pool(None)

    def solve(self, scale: float) -> None:
        """Computes the term of the collected micro-batches; :meth:`finish` then hands out their parts.

        Args:
            scale: Factor of the loss scaler, 1 without one.
        """
        self._note(self.ahead.solve(self.term, self.arguments.hera_weight, scale))

    def end(self) -> None:
        """Called after the backward pass: stops reading and, once, checks that gradient reached what is aligned.

        Raises:
            RuntimeError: The first backward pass with comparable samples left all of it without gradient.
        """
        if not self._gradient_checked and self._gradient_due and self.arguments.hera_weight > 0:
            if not self.capture.gradient_seen:
                raise RuntimeError(self._idle_message("no gradient arrived at them in the first backward pass"))
            self._gradient_checked = True
        self.capture.pool(None)

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
        self.statistics.count(hera_duplicates=output.n_duplicates, hera_empty_steps=int(output.n_samples == 0))

    def _count_non_finite(self, broken: Tensor) -> None:
        self._nan_in_a_row += 1
        self.statistics.count(hera_nan_steps=1)
        if self._nan_in_a_row < self.arguments.hera_max_nan:
            return
        names = [name for name, bad in zip(self.sites.names, broken.tolist(), strict=True) if bad]
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
        """Warns when no sample of the run so far has entered the term."""
        if self._idle_steps:
            logger.warning(f"The HeRA term was 0 in all {self._idle_steps} steps so far: {self._why_idle()}")

    def _why_idle(self) -> str:
        if self.objective.uses_candidates:
            return (
                "no sample with an image had another one, with another image, to be compared with. Mix in more "
                f"samples with images, use a larger batch, or set hera_memory: {4 * self.arguments.hera_k}."
            )
        least = self.objective.least_samples
        return f"no batch had {least} samples with an image. Mix in more of them, or use a larger batch."

    def _check_not_idle(self, model: nn.Module) -> None:
        whole = isinstance(self.capture, LayerCapture)
        if not any(trainable_upstream(model, layer, whole) for layer in self.sites.layers):
            trainable = [name for name, p in model.named_parameters() if p.requires_grad]
            shown = ", ".join(trainable[:3]) or "nothing"
            raise ValueError(self._idle_message(f"nothing that feeds them is trained ({shown} … is)"))

    def _idle_message(self, why: str) -> str:
        return (
            f"{self.sites.KEY}: the HeRA term cannot change {self.sites}: {why}. Train something before them "
            "(freeze_multi_modal_projector: false, freeze_language_model: false, or lora_target: all), or choose "
            "later layers."
        )

    def logs(self) -> dict[str, float]:
        """The running statistics since the last call, equal on every rank but for rounding."""
        return {**self.statistics.take(), **self.objective.values()}
