"""The alignment of one run (paper, eq. 9): reads the targets, asks the teacher, computes the weighted term.

Any training loop can use it; integrations/transformers.py does for every Trainer::

    aligner = Aligner(model, HeraConfig(heads="L13H12,L7H6", teacher="facebook/dinov2-large"))
    loader = DataLoader(dataset, batch_size, collate_fn=aligner.collator(collate))
    for batch in loader:
        micro_batch = aligner.begin(batch)         # names the tokens that are read; takes the teacher's inputs out
        loss = model(**batch).loss
        loss = loss + aligner.finish(micro_batch)  # the weighted term
        loss.backward()
        aligner.end()
        aligner.step(learning_rate)                # what the objective trains, beside the optimizer's own step
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from ..alignment.batches import LEAST_GROUPED, NeighborSampler
from ..alignment.gather import rank
from ..alignment.memory import CrossBatchMemory
from ..config import HeraConfig
from ..heads import HeadCapture, LayerCapture, Targets
from ..heads.families import (
    decoder_layers,
    head_layout,
    media_token_ids,
    model_config,
    output_projection,
    trainable_upstream,
)
from ..heads.hooks import DecoderInputs
from ..heads.pooling import IGNORE_INDEX, grid_side, text_mask, token_mask, token_positions
from ..heads.targets import AUTO
from ..objectives import Options, Plan, Step, TokenBatch, create, find
from ..teachers.images import ImageLike, sample_images
from .checkpoint import earlier_values, load_state, save_state
from .checks import check_attention, check_eval
from .collator import NO_IMAGE, PREFIX, HeraCollator, StudentImages, TeacherFeatures
from .gradcache import GradientCache
from .optimizer import ObjectiveOptimizer
from .term import HeraTerm, TermOutput, token_term

logger = logging.getLogger("llamafactory_hera")

_COUNT = "micro_batches"  # of an objective on tokens, in a checkpoint
_IDLE_STEPS = 10  # without any sample that entered, from the start on, after which a run warns


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch between :meth:`Aligner.begin` and :meth:`Aligner.finish`."""

    valid: Tensor  #: Boolean ``[B]``: the sample has an image, and tokens to be read.
    inputs: dict[str, Tensor]  #: What :class:`HeraCollator` added to the batch.
    pixels: Tensor | None = None  #: What the student sees, for an objective on tokens.
    facts: dict[str, Tensor] = field(default_factory=dict)  #: Of the objective's plan.
    planned: bool = False  #: The plan says who enters: nobody is no fault then.


class Aligner:
    """Everything of the method that lives as long as a run; knows no trainer.

    Args:
        model: A transformers model, bare or under PEFT, before an engine wraps it.
        config: The ``hera_*`` keys.
        targets: The heads or layers to align, by default those that ``config`` names.
        device: Where the step runs, by default that of the model's first parameter.
        dtype: Compute type of the teacher.
        seed: Of what the objective draws.
        image_processor: The student's, by default that of the folder that the model was loaded from; needed by an
            objective on visual tokens.

    Raises:
        ValueError: Targets outside the model, nothing trainable in front of them, or a teacher that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        config: HeraConfig,
        targets: Targets | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        image_processor: Any = None,
    ) -> None:
        check_eval(config)
        device = next(model.parameters()).device if device is None else device
        self.config = config
        self.targets = _named_targets(config, model) if targets is None else targets
        capture_class = LayerCapture if self.targets.granularity == "layer" else HeadCapture
        self.capture: HeadCapture | LayerCapture = capture_class(model, self.targets)
        self._check_trainable(model)
        model_configuration = model_config(model)
        self._media_token_ids = media_token_ids(model_configuration)
        kind = find(config.objective)
        self._side = 0  # tokens along a side of an image; 0 where none are read
        student = None
        if kind.view != "pooled":
            check_attention(kind, config.objective, model_configuration, model_configuration._attn_implementation)
            self._side = grid_side(model_configuration, config.objective)
            patch = model_configuration.vision_config.patch_size if kind.view == "patches" else 0
            processor = image_processor or _image_processor(model_configuration)
            student = StudentImages(self._side, processor, covered=self._side * patch)
            if self.targets.granularity == "head":
                _warn_of_dropout(model, self.targets)
            if kind.plans_attention and config.weight > 0:
                _warn_of_trained_decoder(model, config.objective)
        self.teacher = TeacherFeatures(config, device, dtype, student, latents=kind.view == "latents")
        n_trained = sum(parameter.requires_grad for parameter in model.parameters())
        self._identity = self.targets, self.teacher.encoder.fingerprint, config, n_trained  # of a checkpoint
        options = Options(
            n_targets=len(self.targets.items),
            dim=head_layout(model_configuration).hidden_size,
            teacher_dim=self.teacher.encoder.dim,
            temperature=config.temperature,
            learn_temperature=not config.fixed_temperature,
            projector=config.projector,
            side=self._side,
            initializer_range=getattr(model_configuration.get_text_config(), "initializer_range", 0.02),
            visual_attention=config.visual_attention,
            weight=config.weight,
        )
        self.objective = create(config.objective, options, seed).to(device)
        self.optimizer = ObjectiveOptimizer(self.objective)
        if config.own_from is not None:
            self.optimizer.load_values(earlier_values(config))
        self.memory = CrossBatchMemory(config.memory)
        self.decoder_inputs = DecoderInputs(model, two_way=config.visual_attention == "two_way")
        self.term: HeraTerm | None = None  # of pooled vectors
        if student is None:
            self.term = HeraTerm(self.objective, config.k, config.normalize, self.memory)
        else:
            self._image_token = model_configuration.image_token_id
        self._seed, self._n_micro_batches, self._n_steps = seed, 0, 0
        #: Samples of a process's largest micro-batch; unless it is set, processes agree on it at each step, and wait.
        self.batch_size: int | None = None
        self.statistics = RunningMeans()
        self.cached = GradientCache()
        # on the device, which the host does not wait for
        self._nan_in_a_row = self._most_nan = torch.zeros((), dtype=torch.long, device=device)
        self._was_finite = torch.zeros((), dtype=torch.bool, device=device)  # a term since the run began
        self._broken = torch.zeros(len(self.targets.items), dtype=torch.bool, device=device)  # in the last such step
        self._left_out: Tensor | None = None  # a term since the last optimizer step was not finite
        self._batch_checked = self._gradient_due = False
        self._ordered = config.batches == "random"  # or somebody has asked for the order
        # From the first gradient on all goes well but for what log lines tell; until then the host waits and looks.
        self._gradient_checked = config.weight == 0
        self._enters = False  # samples did in the last term, while the host looks
        self._comparable = False  # all of them must have a gradient
        self._idle_steps: int | None = 0  # None once a sample has entered

    def collator(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        images_of: Callable[[Any], list[ImageLike]] = sample_images,
        drop: tuple[str, ...] = (),
        decode: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> HeraCollator:
        """A collator of training batches with the teacher's view of each sample.

        Args:
            collate: The loop's own collator.
            images_of: From a row of the dataset to its images.
            drop: Columns that ``collate`` must not see.
            decode: What decodes the images of a row of :func:`~..teachers.images.undecoded`.
        """
        processor = None if self._side else getattr(self.teacher.encoder, "processor", None)
        return HeraCollator(
            collate, processor, cache=self.teacher.cache, images_of=images_of, drop=drop, decode=decode,
            image_index=self.config.image_index, one_image=self.objective.one_image,
            tokens=(self._image_token, self._side**2) if self._side else None,
        )  # fmt: skip

    def sampler(
        self,
        dataset: Any,
        batch_size: int,
        images_of: Callable[[Any], list[ImageLike]] = sample_images,
        seed: int = 0,
        num_workers: int = 0,
    ) -> NeighborSampler:
        """The order of samples that ``hera_batches: neighbors`` means; every process must call it.

        Args:
            dataset: Rows by number, as the collator sees them.
            batch_size: Samples that are compared with one another, over all processes.
            images_of: From a row of the dataset to its images.
            seed: Of the order.
            num_workers: Processes that decode images whose features the cache lacks.

        Raises:
            ValueError: An image is missing or corrupt, and is named; or the batch is too small for groups.
        """
        if batch_size < LEAST_GROUPED:
            raise ValueError(f"batch_size: {batch_size} is too small for groups; give {LEAST_GROUPED} or more.")
        self._ordered = True
        shown, features_of = self.teacher.of_dataset(dataset, images_of, self.config, num_workers)
        return NeighborSampler(shown, features_of, batch_size, self.config.k, self.config.normalize, seed)

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def begin(self, batch: dict[str, Any]) -> MicroBatch | None:
        """Takes the teacher's inputs out of a batch and names the tokens to read, before the forward pass.

        Returns:
            What :meth:`finish` takes; None for a batch of another collator, such as one for evaluation.

        Raises:
            ValueError: The first batch with images lacks them, or does not tell the answer from the prompt.
        """
        inputs = {name: batch.pop(name) for name in list(batch) if name.startswith(PREFIX)}
        if self._side:
            self.decoder_inputs.install()
        if not inputs:
            return None
        self.capture.install()
        self.capture.watch_gradients = not self._gradient_checked
        shown = inputs["hera_source"] != NO_IMAGE
        input_ids, attention_mask = batch["input_ids"], batch.get("attention_mask")
        if not self._batch_checked and bool(shown.any()):
            self._check_batch(batch, shown)
            self._batch_checked = True
        if self.teacher.student is not None:
            return self._begin_tokens(batch, inputs, shown, self.teacher.student)
        mask = token_mask(self.config.pooling, input_ids, attention_mask, batch.get("labels"), self._media_token_ids)
        self.capture.pool(mask)
        return MicroBatch(shown & mask.any(dim=1), inputs)

    def _begin_tokens(
        self, batch: dict[str, Any], inputs: dict[str, Tensor], shown: Tensor, student: StudentImages
    ) -> MicroBatch:
        """Names the visual tokens, and lets the objective plan the forward pass."""
        ids, mask, which = batch["input_ids"], batch.get("attention_mask"), inputs["hera_image"]
        positions = token_positions(ids, mask, which, self._image_token, self._side**2)
        attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        number, self._n_micro_batches = self._n_micro_batches, self._n_micro_batches + 1
        step = Step(ids, attended, positions, shown, self._side, self._seed, rank(), number)
        plan = self.objective.prepare(step) or Plan()
        if plan.attention is not None and not self.objective.plans_attention:
            raise ValueError(
                f"hera_objective: {self.config.objective} plans an attention mask; set plans_attention = True in its "
                "class, by which models that take none are refused."
            )
        self.decoder_inputs.set(plan.attention, plan.embeddings)
        self.capture.tokens(positions if plan.positions is None else plan.positions)
        if plan.nobody:
            shown = torch.zeros_like(shown)
            inputs.pop("hera_rows", None)
        elif plan.valid is not None:
            shown = plan.valid
        planned = plan.nobody or plan.valid is not None
        return MicroBatch(shown, inputs, student.pixels(batch, which), plan.facts, planned)

    def _check_batch(self, batch: dict[str, Any], shown: Tensor) -> None:
        """What no recipe or row could tell: looked at once, as it makes the host wait for the device."""
        if not self._ordered:
            raise ValueError(
                f"hera_batches: {self.config.batches} is an order of the samples, and nobody has asked for it: give "
                "the DataLoader sampler=aligner.sampler(dataset, batch_size), or set hera_batches: random."
            )
        if not self._media_token_ids:
            return
        ids = batch["input_ids"][shown]
        attended = torch.ones_like(ids, dtype=torch.bool)
        if batch.get("attention_mask") is not None:
            attended = batch["attention_mask"][shown].bool()
        text = text_mask(ids, attended, self._media_token_ids)
        media = attended & ~text
        if not media.any():
            raise ValueError(
                f"data_collator: {len(ids)} samples of the first batch have images, and their input_ids hold no token "
                "of an image: the collator drops them, or they were cut off. Give it the images "
                "(remove_unused_columns=False, a processor), and let texts be longer."
            )
        if not any(name.startswith("pixel_values") for name in batch):
            raise ValueError(
                f"data_collator: {len(ids)} samples of the first batch have images, and it holds no pixel_values "
                f"(only {', '.join(batch)}): the model would not see them. Give the collator the images."
            )
        if self.config.pooling == "answer" and batch.get("labels") is not None:
            labeled = batch["labels"][shown] != IGNORE_INDEX
            # in front of an image stands a prompt; a caption behind it, with a label on everything, is stage 1
            in_front = text & (media.cumsum(dim=1) == 0)
            if labeled[text].all() and in_front.any():
                raise ValueError(
                    "hera_pooling: answer averages over the tokens with a label, and in the first batch all text has "
                    "one, what stands in front of the image, too. Let only answers have labels (-100 elsewhere; in "
                    "TRL a dataset of prompt and completion, or assistant_only_loss), or set hera_pooling: text to "
                    "average over all text."
                )

    def finish(self, micro_batch: MicroBatch | None) -> Tensor:
        """The weighted term of the forward pass just made; every rank must call it.

        Raises:
            ValueError: There is no micro-batch: the batch was not made by :meth:`collator`.
            RuntimeError: Nothing that is aligned can carry a gradient; or, in the first steps, as :meth:`logs`.
        """
        if micro_batch is None:
            raise ValueError(
                "finish: begin gave None, as the batch was not made by aligner.collator(...); make it with that, or "
                "leave finish and end out for it."
            )
        self.decoder_inputs.set()
        representations = self.capture.representations()
        if len(self.cached):
            term = self.cached.take(representations)
        else:
            features = self.teacher.features(micro_batch.inputs, micro_batch.pixels)
            if self.term is not None:
                output = self.term(representations, features, micro_batch.valid, self.batch_size)
            else:
                projections = self.capture.projections() if isinstance(self.capture, HeadCapture) else None
                batch = TokenBatch(representations, projections, features, micro_batch.valid, micro_batch.facts)
                output = token_term(self.objective, batch)
            self._record(output, micro_batch.planned)
            term = self.config.weight * output.loss
        if not self._gradient_checked:
            self.cached.check()
            if self._enters and not representations.requires_grad:
                raise RuntimeError(self._idle_message("their outputs carry no gradient in this setup"))
            # a rank whose samples have no image gets a gradient of zero
            self._gradient_due = self._comparable and bool(micro_batch.valid.any())
        return term

    def collect(self, micro_batch: MicroBatch) -> None:
        """Adds the forward pass just made, without a graph, to those that :meth:`solve` takes together."""
        features = self.teacher.features(micro_batch.inputs)
        self.cached.add(self.capture.representations(), features, micro_batch.valid)
        self.capture.pool(None)

    def solve(self, scale: float | Tensor = 1.0) -> None:
        """Computes the term of what was collected, whose parts :meth:`finish` hands out; ``scale`` as for step."""
        assert self.term is not None
        self._record(self.cached.solve(self.term, self.config.weight, scale, self.batch_size))

    def end(self) -> None:
        """Called after the backward pass: stops reading and, once, checks that gradient reached what is aligned.

        Raises:
            RuntimeError: The first backward pass with comparable samples left all of it without gradient.
        """
        if not self._gradient_checked and self._gradient_due:
            if self.capture.gradient_seen:
                self._gradient_checked = True
            elif self._n_steps >= self.objective.silent_steps:
                raise RuntimeError(self._idle_message("no gradient arrived at them in the first backward pass"))
        self.capture.pool(None)

    def step(self, learning_rate: float, scale: float | Tensor = 1.0, peak: float | None = None) -> None:
        """Trains what the objective trains by one step, then forgets its gradients; every rank must call it.

        There is none where a term since the last step was left out, as it was not finite.

        Args:
            learning_rate: The run's at this step.
            scale: Factor of the loss scaler that the gradients still have, 1 without one.
            peak: The run's ``learning_rate``, the peak of its schedule, for ``hera_own_learning_rate``.

        Raises:
            ValueError: That key is set, and the peak is not given or 0.
        """
        if self.config.own_learning_rate is not None:
            if not peak:
                raise ValueError(
                    f"hera_own_learning_rate: {self.config.own_learning_rate} is a peak on the run's schedule, whose "
                    "own is not given or 0; call step(learning_rate, peak=...), or remove the key."
                )
            learning_rate *= self.config.own_learning_rate / peak
        if self._n_steps < self.objective.silent_steps and learning_rate > 0:
            gradients = (p.grad for p in self.objective.parameters() if p.grad is not None)
            self._n_steps += any(bool(gradient.any()) for gradient in gradients)
        self.optimizer.step(learning_rate, scale, self._left_out)
        self._left_out = None

    # -- the run ---------------------------------------------------------------------------------------------------

    def logs(self) -> dict[str, float]:
        """The running statistics since the last call; of pooled objectives equal on every rank but for rounding.

        Raises:
            RuntimeError: ``hera_max_nan`` terms in a row were not finite, or gradient caching ran a micro-batch twice
                with different outputs.
        """
        self._look()
        return {**self.statistics.take(), **self.objective.values()}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes targets, objective, its optimizer and memory into ``folder/hera``; each file whole or not at all."""
        state = {**self.optimizer.state(), **self.memory.state_dict()}
        if self._side:
            state[_COUNT] = torch.tensor(self._n_micro_batches)
        save_state(folder, state, *self._identity, self.objective.values())

    def load(self, folder: str | os.PathLike) -> None:
        """Restores what :meth:`save` wrote.

        Raises:
            ValueError: The checkpoint is not of a HeRA run, or of one that aligned something else.
        """
        state = load_state(folder, *self._identity)
        self.optimizer.load_state(state)
        self.memory.load_state_dict(state)
        self._n_micro_batches = int(state.get(_COUNT, 0))

    def finalize(self) -> None:
        """Ends the run: takes the hooks away and writes the features that wait in memory."""
        self._look()
        self._warn_when_idle()
        self.capture.remove()
        if self.config.visual_attention == "causal":  # the model's attention otherwise, in evaluation, too
            self.decoder_inputs.remove()
        self.teacher.flush()

    def _record(self, output: TermOutput, planned: bool = False) -> None:
        sound, entered = output.sound, output.n_samples > 0
        self._was_finite = self._was_finite | sound
        self._left_out = ~sound if self._left_out is None else self._left_out | ~sound
        self._nan_in_a_row = torch.where(sound, 0, self._nan_in_a_row + 1)
        self._most_nan = torch.maximum(self._most_nan, self._nan_in_a_row)
        self._broken = torch.where(sound, self._broken, output.broken)
        # a micro-batch of tokens without any is no part of the mean
        known = sound & entered if self._side else sound
        self.statistics.add(hera_loss=torch.where(known, output.loss.detach(), math.nan))
        if not self._side:
            self.statistics.add(hera_mknn=output.mknn.mean(), hera_mknn_chance=output.chance)
        self.statistics.count(hera_duplicates=torch.where(sound, output.n_duplicates, 0), hera_nan_steps=~sound)
        if not planned:
            self.statistics.count(hera_empty_steps=sound & ~entered)
        if not self._gradient_checked:
            self._look()
            self._comparable, self._enters = bool(output.comparable), bool(entered & sound)
            if self._enters:
                self._idle_steps = None
            elif self._idle_steps is not None and not planned and bool(sound):
                self._idle_steps += 1
                if self._idle_steps == _IDLE_STEPS:
                    self._warn_when_idle()

    def _look(self) -> None:
        """What only the device knew until now; the host waits for it here."""
        if self.term is not None:
            self.term.warn_when_few()
        self.cached.check()
        if (in_a_row := int(self._most_nan)) < self.config.max_nan:
            return
        where = ", ".join(name for name, bad in zip(self.targets.names, self._broken.tolist(), strict=True) if bad)
        remedy = "Lower the learning rate, or train in bf16 or fp32 instead of fp16"
        if not self._was_finite.item():
            remedy = "No step was finite: the weights of model_name_or_path may hold NaN, or not fit fp16; load others"
        if not where:
            where, remedy = "the teacher's features", "The teacher's weights or the images are broken"
        raise RuntimeError(
            f"The HeRA term was not finite in {in_a_row} steps in a row (hera_max_nan), because of {where}. {remedy}."
        )

    # -- never a silent no-op --------------------------------------------------------------------------------------

    def _warn_when_idle(self) -> None:
        if not self._idle_steps or rank() > 0 or self.config.weight == 0:
            return
        why = f"no batch had {self.objective.least_samples} samples with an image"
        remedy = "Mix in more samples with images, or use a larger batch"
        if self.objective.uses_candidates:
            why = "no sample with an image had another one, with another image, to be compared with"
            remedy += f", or set hera_memory: {4 * self.config.k}"
        logger.warning(f"The HeRA term was 0 in all {self._idle_steps} steps so far: {why}. {remedy}.")

    def _check_trainable(self, model: nn.Module) -> None:
        whole = self.targets.granularity == "layer"
        if not any(trainable_upstream(model, layer, whole) for layer in self.targets.layers):
            shown = ", ".join([name for name, p in model.named_parameters() if p.requires_grad][:3]) or "nothing"
            raise ValueError(self._idle_message(f"nothing that feeds them is trained ({shown} … is)"))

    def _idle_message(self, why: str) -> str:
        return (
            f"{self.targets.key}: the HeRA term cannot change {self.targets}: {why}. Train something before them "
            "(the projector, the language model, or adapters on more of it; in LLaMA-Factory "
            "freeze_multi_modal_projector: false, freeze_language_model: false, or lora_target: all), or choose later "
            "layers."
        )


def _named_targets(config: HeraConfig, model: nn.Module) -> Targets:
    if config.named_targets == AUTO:
        raise ValueError(
            f"{config.targets_key}: auto selects before training, which a Trainer with HeRA does, and a loop of your "
            "own must do: name the file that a selection wrote."
        )
    return Targets.named(config.named_targets, config.granularity, head_layout(model_config(model)))


def _image_processor(configuration: Any) -> Any:
    """The image processor beside a model's weights."""
    try:
        return AutoImageProcessor.from_pretrained(configuration._name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: {configuration._name_or_path!r} holds no image processor ({error}), which says how "
            "to undo what it did to the pixels; save the model's processor there."
        ) from error


def _warn_of_trained_decoder(model: nn.Module, objective: str) -> None:
    if rank() == 0 and any(p.requires_grad for layer in decoder_layers(model) for p in layer.parameters()):
        logger.warning(
            "freeze_language_model: false lets the language model learn under the attention that hera_objective: "
            f"{objective} plans, not under its own; that is for a stage that trains the projector alone."
        )


def _warn_of_dropout(model: nn.Module, targets: Targets) -> None:
    layers = decoder_layers(model)
    parts = [part for layer in targets.layers for part in output_projection(layers[layer]).modules()]
    if rank() == 0 and any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts):
        logger.warning(
            "lora_dropout: a head's part of o_proj is read once for all tokens of a micro-batch, so that dropout in "
            "the adapter drops the same of all of them; 0 avoids that."
        )


class RunningMeans:
    """Means of step statistics between two log lines, without their NaN values: sums on the device, read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Adds scalar tensors to the means of their names."""
        for name, value in values.items():
            known = ~torch.isnan(value)
            self._sums[name] = self._sums.get(name, 0.0) + torch.where(known, value, 0.0).double()
            self._numbers[name] = self._numbers.get(name, 0) + known

    def count(self, **increments: Tensor) -> None:
        """Adds to counters; a counter that stays 0 is not reported."""
        for name, increment in increments.items():
            self._counts[name] = self._counts.get(name, 0) + increment.long()

    def take(self) -> dict[str, float]:
        """Means and counts since the last call; NaN where no value was known."""
        means = {
            name: total.item() / n if (n := int(self._numbers[name])) else math.nan
            for name, total in self._sums.items()
        }
        counts = {name: float(n) for name, value in self._counts.items() if (n := int(value))}
        self._sums, self._numbers, self._counts = {}, {}, {}
        return means | counts
