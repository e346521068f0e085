"""Pooled outputs of all samples, on disk in blocks: a killed run goes on, and memory holds one layer at a time."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..alignment.gather import barrier, rank, world_size
from ..config import HeraConfig, StoredDtype
from ..files import write_safetensors
from ..heads.families import head_layout, model_config
from ..heads.pooled import PooledHeads
from .forward import Forward, plan_batches, run_batches
from .samples import Collate, Sample

logger = logging.getLogger(__name__)

#: Of the names of folders that are deleted once their features are scored.
PREFIX = "features-"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class FeatureBlocks:
    """Files ``block-00000.safetensors`` in a folder named by what the features depend on.

    Args:
        folder: Where that folder lies.
        key: Digest of all that the features depend on.
        rows: For each block, the samples that it holds.
        n_layers: Decoder layers of the model.
        dtype: Precision on disk.
    """

    def __init__(
        self, folder: Path, key: str, rows: list[list[int]], n_layers: int, stored_dtype: StoredDtype
    ) -> None:
        self.folder = folder / f"{PREFIX}{key[:16]}"
        self.rows = rows
        self._n_layers = n_layers
        self._dtype = _DTYPES[stored_dtype]
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
        for index in range(self._n_layers):
            tensors[f"heads.{index}"] = self._stored(heads[:, index])
            tensors[f"layer.{index}"] = self._stored(layers[:, index])
        try:
            write_safetensors(self._path(block), tensors)
        except OSError as error:
            raise ValueError(
                f"output_dir: {self._path(block)} cannot be written ({error}). Free space there, or give another "
                "folder; what was computed before stays there and is used by the next run."
            ) from error

    def read(self, kind: Literal["heads", "layer"], device: torch.device) -> Iterator[Tensor]:
        """Each layer's head outputs ``[N, H, d]``, or its own output ``[N, D]``, in the order of the samples."""
        rows = torch.tensor([row for block in self.rows for row in block])
        for index in range(self._n_layers):
            parts = []
            for block in range(len(self.rows)):
                with safe_open(self._path(block), "pt") as file:
                    parts.append(file.get_tensor(f"{kind}.{index}"))
            together = torch.cat(parts)
            ordered = torch.empty_like(together)
            ordered[rows] = together
            yield ordered.to(device)

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
                return len(file.keys()) == 2 * self._n_layers
        except SafetensorError as error:
            logger.warning("%s is damaged and computed again (%s).", self._path(block), error)
            return False

    def _stored(self, values: Tensor) -> Tensor:
        stored = values.to(self._dtype)
        if self._dtype == torch.float16 and (stored.isinf() & values.isfinite()).any():
            raise ValueError(
                f"hera_select_dtype: fp16 cannot hold {values.abs().max():.3g}, an output of this model; use fp32."
            )
        return stored


def compute_features(
    forward: Forward,
    samples: Sequence[Sample],
    collate: Collate,
    config: HeraConfig,
    folder: Path,
    key: str,
    num_workers: int = 0,
) -> FeatureBlocks:
    """Runs all samples through the model, shared out over the processes of the launch.

    Args:
        forward: Around the model, which is in evaluation mode.
        samples: N samples, the same on every process.
        collate: From samples to a batch.
        config: Pooling, batch size and precision on disk.
        folder: Where the blocks' folder is made.
        key: Names model, images and settings; features of the same key are taken from an earlier, killed run.
        num_workers: Processes that collate.

    Returns:
        The complete blocks of features.

    Raises:
        ValueError: The output folder cannot be written, or other processes' blocks cannot be seen in it.
    """
    features = [sample.features for sample in samples]
    batches = plan_batches([len(feature["input_ids"]) for feature in features], config.select.batch_size)
    n_blocks = batches[-1].block + 1
    rows = [[row for batch in batches if batch.block == block for row in batch.rows] for block in range(n_blocks)]
    key = hashlib.sha256(json.dumps([key, [feature["input_ids"] for feature in features], rows]).encode()).hexdigest()
    blocks = FeatureBlocks(folder, key, rows, head_layout(model_config(forward.model)).n_layers, config.select.dtype)
    missing = blocks.missing()
    barrier()  # nobody writes before everybody has looked
    if rank() == 0 and len(missing) < n_blocks:
        logger.warning("%s: %d of %d blocks are there; going on.", blocks.folder, n_blocks - len(missing), n_blocks)
    mine = set(missing[rank() :: world_size()])
    todo = [batch for batch in batches if batch.block in mine]
    n_samples = sum(len(batch.rows) for batch in todo)
    waiting: dict[int, tuple[Tensor, Tensor]] = {}  # row -> its heads and layers
    with (
        ThreadPoolExecutor(1) as writer,  # a block is written while the next one is computed
        PooledHeads(forward.model) as pooled,
        torch.no_grad(),
        tqdm(total=n_samples, desc="HeRA | scoring pass", unit="sample", disable=rank() != 0) as bar,
    ):

        def run(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            pooled.pool(forward.tokens(config.pooling, batch))
            forward.run(batch)
            heads, layers = pooled.take()
            return heads.cpu(), layers.cpu()

        written = writer.submit(lambda: None)
        for batch, (heads, layers) in run_batches(todo, features, collate, run, num_workers):
            waiting.update(zip(batch.rows, zip(heads, layers, strict=True), strict=True))
            together = rows[batch.block]
            if all(row in waiting for row in together):
                written.result()
                block_heads, block_layers = zip(*(waiting.pop(row) for row in together), strict=True)
                written = writer.submit(blocks.write, batch.block, torch.stack(block_heads), torch.stack(block_layers))
            bar.update(len(batch.rows))
        written.result()
    barrier()
    unseen = blocks.missing()
    if unseen:
        raise ValueError(
            f"output_dir: {blocks.folder} lacks {len(unseen)} blocks that other processes wrote; on several machines "
            "it must be a folder that all of them share."
        )
    barrier()  # nobody deletes them before everybody has seen them
    return blocks
