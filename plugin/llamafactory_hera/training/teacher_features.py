"""The teacher of a run and its cache, which turn the collator's tensors into features in each training step."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import HeraConfig
from ..teachers.cache import FeatureCache
from ..teachers.encoder import VisionTeacher
from .collator import CACHED, NO_IMAGE
from .token_term import StudentImages

logger = logging.getLogger("llamafactory_hera")


class TeacherFeatures:
    """Looks up or computes the teacher's features; for objectives on tokens, ``student`` describes the shared pixels.

    ``torch.where`` selects the cached samples on the device. The CPU waits for the device only when it adds computed
    features to the cache, once per image.
    """

    def __init__(
        self, config: HeraConfig, device: torch.device, dtype: torch.dtype, student: StudentImages | None = None
    ) -> None:
        self.student = student
        teacher_class = getattr(config.objective_class(), "teacher_class", None) or VisionTeacher
        if student is not None:
            teacher_class.check(config.teacher, student.side)
        self.encoder: Any = teacher_class.from_pretrained(config.teacher, device=device, dtype=dtype)
        self.cache: FeatureCache | None = None
        if config.teacher_cache and config.reads("hera_teacher_cache"):
            fingerprint, size = self.encoder.fingerprint, self.encoder.dim
            if student is not None:
                fingerprint, size = student.fingerprint(fingerprint), size * student.side**2
            self.cache = FeatureCache(config.teacher_cache, fingerprint, size)

    def features(self, inputs: dict[str, Tensor], pixels: Tensor | None = None) -> Tensor:
        """Returns the features of a batch's samples, ``[B, D_teacher]``, or of their tokens, ``[B, T, D_teacher]``.

        Features are 0 for a sample without an image, and NaN for a sample whose tensors were lost on the way here.
        """
        source, rows = inputs["hera_source"], inputs.get("hera_rows")
        if pixels is None:
            pixels = inputs.get("hera_pixels")
        n_tokens = 1 if self.student is None else self.student.side**2
        features = torch.full((len(source), n_tokens * self.encoder.dim), torch.nan, device=source.device)
        features = torch.where((source == NO_IMAGE).unsqueeze(1), 0.0, features)
        if "hera_features" in inputs:
            held = inputs["hera_features"].view(torch.float16).to(features)
            features = torch.where((source == CACHED).unsqueeze(1), held, features)
        if pixels is not None and rows is not None:
            if self.student is None:
                computed = self.encoder.encode(pixels[rows])
            else:
                computed = self.encoder.patch_features(pixels[rows], self.student.side).flatten(1)
            features = features.index_copy(0, rows, self._store(inputs, computed))
        return features if self.student is None else features.unflatten(1, (n_tokens, -1))

    def _store(self, inputs: dict[str, Tensor], computed: Tensor) -> Tensor:
        """Caches features, and returns them as rounded by the cache, so a resumed run reads the same values."""
        if self.cache is None:
            return computed
        rounded, keys = computed.half(), inputs["hera_keys"][inputs["hera_rows"]].cpu()
        features = rounded.cpu()
        finite = features.isfinite().all(dim=1)  # the term tolerates a few others, and the cache does not store them
        self._write(lambda cache: cache.put([bytes(key) for key in keys[finite].numpy()], features[finite]))
        return rounded.to(computed)

    def flush(self) -> None:
        """Writes the features that the cache still holds in memory; a failure only disables the cache."""
        self._write(FeatureCache.flush)

    def _write(self, write: Callable[[FeatureCache], None]) -> None:
        try:
            if self.cache is not None:
                write(self.cache)
        except OSError as error:
            assert self.cache is not None
            logger.warning(
                f"hera_teacher_cache: {self.cache.folder} cannot be written ({error}); the run continues without the "
                "cache and computes the features that it needs."
            )
            self.cache = None
