"""Pooled outputs on disk, in blocks of samples, so that a killed run goes on and memory holds one layer at a time."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import write_safetensors
from ..heads.families import HeadLayout
from .settings import StoredDtype

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
#: Of the names of folders that are deleted once their features are scored.
PREFIX = "features-"


class FeatureBlocks:
    """Files ``block-00000.safetensors`` in a folder named by what the features depend on.

    Args:
        folder: Where that folder lies.
        key: Digest of all that the features depend on.
        rows: For each block, the samples that it holds.
        layout: Sizes of the model's heads.
        stored_dtype: Precision on disk.
    """

    def __init__(
        self, folder: Path, key: str, rows: list[list[int]], layout: HeadLayout, stored_dtype: StoredDtype
    ) -> None:
        self.folder = folder / f"{PREFIX}{key[:16]}"
        self.rows = rows
        self._layout = layout
        self._dtype = DTYPES[stored_dtype]
        self.folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[int]:
        """Blocks that are not there yet, or not whole."""
        return [block for block in range(len(self.rows)) if not self._is_whole(block)]

    def write(self, block: int, heads: Tensor, layers: Tensor) -> None:
        """Stores a block; the file appears complete or not at all.

        Args:
            block: Its number.
            heads: ``[B, L, H, d]`` in the order of its rows.
            layers: ``[B, L, D]``.

        Raises:
            ValueError: A finite value does not fit the storage type, or the file cannot be written.
        """
        tensors = {}
        for index in range(self._layout.n_layers):
            tensors[f"heads.{index}"] = self._stored(heads[:, index])
            tensors[f"layer.{index}"] = self._stored(layers[:, index])
        try:
            write_safetensors(self._path(block), tensors)
        except OSError as error:
            raise ValueError(
                f"output_dir: {self._path(block)} cannot be written ({error}). Free space there, or give another "
                "folder; what was computed before stays there and is used by the next run."
            ) from error

    def heads(self, device: torch.device) -> Iterator[Tensor]:
        """Each layer's head outputs ``[N, H, d]``, in the order of the samples."""
        for index in range(self._layout.n_layers):
            yield self._read(f"heads.{index}", device)

    def layers(self, device: torch.device) -> Iterator[Tensor]:
        """Each layer's own output ``[N, D]``, in the order of the samples."""
        for index in range(self._layout.n_layers):
            yield self._read(f"layer.{index}", device)

    @staticmethod
    def clear(folder: Path) -> None:
        """Deletes the features of this and of earlier runs."""
        for path in folder.glob(f"{PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _is_whole(self, block: int) -> bool:
        if not self._path(block).is_file():
            return False
        try:
            with safe_open(self._path(block), "pt") as file:
                return len(file.keys()) == 2 * self._layout.n_layers
        except SafetensorError as error:
            logger.warning("%s is damaged and computed again (%s).", self._path(block), error)
            return False

    def _stored(self, values: Tensor) -> Tensor:
        stored = values.to(self._dtype)
        if self._dtype == torch.float16 and (stored.isinf() & values.isfinite()).any():
            raise ValueError(
                f"hera_select_dtype: fp16 cannot hold {values.abs().max():.3g}, an output of this model; use fp32."
            )
        return stored.contiguous()

    def _read(self, name: str, device: torch.device) -> Tensor:
        rows = torch.tensor([row for block in self.rows for row in block])
        parts = []
        for block in range(len(self.rows)):
            with safe_open(self._path(block), "pt") as file:
                parts.append(file.get_tensor(name))
        together = torch.cat(parts)
        ordered = torch.empty_like(together)
        ordered[rows] = together
        return ordered.to(device)
