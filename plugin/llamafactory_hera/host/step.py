"""Everything of HeRA that lives as long as a training run: teacher, capture, term, temperature, statistics, state."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture, HeadSet
from llamafactory_hera.heads.families import media_token_ids, model_config
from llamafactory_hera.heads.pooling import token_mask
from llamafactory_hera.heads.upstream import trainable_upstream
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.training.statistics import RunningMeans
from llamafactory_hera.training.temperature import Temperature
from llamafactory_hera.training.term import HeraTerm

from .arguments import HeraArguments
from .collator import CACHED, NO_IMAGE, PIXELS, PREFIX

logger = logging.getLogger("llamafactory.hera")  # a child of the host's logger, which has the handlers

#: Folder beside the weights, in the output folder and in each checkpoint, that holds what belongs to HeRA.
FOLDER = "hera"
HEADS_FILE = "heads.json"
STATE_FILE = "state.safetensors"
RUN_FILE = "run.json"


class HeraStep:
    """Computes the weighted HeRA term of each micro-batch and keeps what outlives it.

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
        self.statistics = RunningMeans()
        self._media_token_ids = media_token_ids(model_config(model))
        self._nan_in_a_row = 0
        self._gradient_checked = False
        self._entered = False

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
        features = self._teacher_features(teacher_inputs)
        valid = (teacher_inputs["hera_source"] != NO_IMAGE) & mask.any(dim=1)
        output = self.term(representations, features, valid, self.temperature())
        self._entered = False
        if not output.finite:
            self._count_non_finite(representations, valid)
            return output.loss
        self._nan_in_a_row = 0
        if output.n_samples and not self._gradient_checked and not representations.requires_grad:
            raise RuntimeError(self._idle_message("their outputs carry no gradient in this setup"))
        # a rank whose samples have no image gets a gradient of zero
        self._entered = output.n_samples > 0 and bool(valid.any())
        self.statistics.add(
            hera_loss=output.loss.detach(), hera_mknn=output.mknn.mean(), hera_mknn_chance=output.chance
        )
        self.statistics.count(hera_duplicates=output.n_duplicates)
        return self.arguments.hera_weight * output.loss

    def end(self) -> None:
        """Called after the backward pass: stops pooling and, once, checks that gradient reached the heads.

        Raises:
            RuntimeError: The first backward pass with HeRA samples left every head without gradient.
        """
        if not self._gradient_checked and self._entered and self.arguments.hera_weight > 0:
            if not self.capture.gradient_seen:
                raise RuntimeError(self._idle_message("no gradient arrived at them in the first backward pass"))
            self._gradient_checked = True
        self.capture.pool(None)

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

    def _count_non_finite(self, representations: Tensor, valid: Tensor) -> None:
        self._nan_in_a_row += 1
        self.statistics.count(hera_nan_steps=1)
        broken = ~representations.detach()[:, valid].isfinite().all(dim=-1).all(dim=-1)
        names = ", ".join(str(head) for head, bad in zip(self.heads.heads, broken.tolist(), strict=True) if bad)
        if self._nan_in_a_row >= self.arguments.hera_max_nan:
            raise RuntimeError(
                f"The HeRA term was not finite in {self._nan_in_a_row} steps in a row (hera_max_nan); the output of "
                f"{names or 'a head on another rank'} is not finite. Lower the learning rate, or train in bf16 or "
                "fp32 instead of fp16."
            )

    # -- never a silent no-op --------------------------------------------------------------------------------------

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

    # -- what is kept ----------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that resumes it."""
        return {
            "hera_heads": str(self.heads),
            "hera_teacher": self.teacher.fingerprint,
            "hera_pooling": self.arguments.hera_pooling,
            "hera_similarity": self.arguments.hera_similarity,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes heads, temperature, optimizer state and memory into ``folder/hera``; each file whole or not."""
        target = Path(folder) / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        state = {**self.temperature.state(), **self.memory.state_dict()}
        temporary = target / f"{STATE_FILE}.tmp"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, temporary)
        os.replace(temporary, target / STATE_FILE)
        self.heads.save(target / HEADS_FILE)
        facts = {**self.identity(), "hera_teacher_name": self.arguments.hera_teacher, "tau": self.temperature.value}
        temporary = target / f"{RUN_FILE}.tmp"
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target / RUN_FILE)

    def load(self, folder: str | os.PathLike) -> None:
        """Restores what :meth:`save` wrote.

        Raises:
            ValueError: The checkpoint is not of a HeRA run, or of one with other heads or another teacher.
        """
        source = Path(folder) / FOLDER
        try:
            saved = json.loads((source / RUN_FILE).read_text(encoding="utf-8"))
            state = load_file(source / STATE_FILE)
        except OSError as error:
            raise ValueError(
                f"resume_from_checkpoint: {folder} holds no complete {FOLDER}/ folder ({error}), so it is not a "
                "checkpoint of stage: hera. Resume a HeRA checkpoint, or start a new run from these weights with "
                "model_name_or_path or adapter_name_or_path."
            ) from error
        now = self.identity()
        changed = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
                "Restore these settings, or start a new run."
            )
        self.temperature.load_state(state)
        device = self.temperature.log_value.device
        self.memory.load_state_dict({name: tensor.to(device) for name, tensor in state.items()})

    def logs(self) -> dict[str, float]:
        """The running statistics since the last call, equal on every rank but for rounding."""
        return {**self.statistics.take(), "hera_temperature": self.temperature.value}
