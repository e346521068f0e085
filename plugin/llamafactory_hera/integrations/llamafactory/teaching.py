"""The teacher's features of the samples of a batch: from the cache, or computed and remembered."""

import logging
from typing import Literal

import torch
from torch import Tensor

from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.teachers.encoder import VisionTeacher

from .arguments import HeraArguments
from .collator import CACHED, PIXELS

logger = logging.getLogger("llamafactory.hera")  # a child of the host's logger, which has the handlers


class Teaching:
    """The teacher of a run and its cache.

    Args:
        arguments: The ``hera_*`` keys.
        view: ``pooled`` for one vector an image, ``patches`` for those of its patches.
        device: Where the step runs.
        dtype: Compute dtype of the teacher.
    """

    def __init__(
        self,
        arguments: HeraArguments,
        view: Literal["pooled", "patches"],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.teacher = VisionTeacher.from_pretrained(arguments.hera_teacher, device=device, dtype=dtype)
        self.cache = None
        if arguments.hera_teacher_cache is not None:
            self.cache = FeatureCache(arguments.hera_teacher_cache, self.teacher.fingerprint, self.teacher.dim)
        self._view = view

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Features of a batch's samples, 0 without an image.

        Args:
            inputs: What the collator added.

        Returns:
            ``[B, D_teacher]``, or ``[B, h, w, D_teacher]`` of patches.
        """
        source = inputs["hera_source"]
        pixels = inputs["hera_pixels"][source == PIXELS] if "hera_pixels" in inputs else None
        if self._view == "patches":
            features = torch.zeros(len(source), *self.teacher.grid, self.teacher.dim, device=source.device)
            if pixels is not None:
                features[source == PIXELS] = self.teacher.encode_patches(pixels)
            return features
        features = torch.zeros(len(source), self.teacher.dim, device=source.device)
        if "hera_features" in inputs:
            features = torch.where((source == CACHED).unsqueeze(1), inputs["hera_features"].to(features), features)
        if pixels is not None:
            features[source == PIXELS] = self._remember(inputs, source == PIXELS, self.teacher.encode(pixels))
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

    def flush(self) -> None:
        """Writes the features that wait in memory; a cache that cannot be written is no reason to stop."""
        if self.cache is not None:
            try:
                self.cache.flush()
            except OSError as error:
                self._drop_cache(error)

    def _drop_cache(self, error: OSError) -> None:
        logger.warning(
            f"hera_teacher_cache: {self.cache.folder} cannot be written ({error}); the run goes on and computes the "
            "features that are not in it."
        )
        self.cache = None
