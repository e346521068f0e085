"""Pooled outputs of all samples, on disk in blocks: a killed run goes on, and memory holds one layer at a time."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..config import HeraConfig
from ..distributed import barrier, rank, world_size
from ..files import write_safetensors
from ..heads.families import head_layout, model_config
from ..heads.probe import PooledHeads
from .passes import Forward, plan_batches, run_batches
from .samples import Sample, SelectionInputs

logger = logging.getLogger(__name__)

#: What helps where the output folder is full.
MAKE_ROOM = "free space there, or give another folder; what was computed before stays and is used by the next run"
#: Of the names of folders with features, which are deleted once they are scored.
PREFIX = "features-"
# A killed run loses at most one block on each process; blocks are what processes share out.
_BLOCK_SAMPLES = 32


class FeatureBlocks:
    """Files ``block-00000.safetensors``, each with some samples (``rows``), in a folder named by a digest."""

    def __init__(self, folder: Path, key: str, rows: list[list[int]], n_layers: int) -> None:
        self.folder = folder / f"{PREFIX}{key[:16]}"
        self.rows = rows
        self._n_layers = n_layers
        self.folder.mkdir(parents=True, exist_ok=True)

    def missing(self) -> list[int]:
        """Blocks that are not there yet, or not whole."""
        return [block for block in range(len(self.rows)) if not self._is_whole(block)]

    def write(self, block: int, heads: Tensor, layers: Tensor) -> None:
        """Stores a block, whole or not at all: heads ``[B, L, H, d]``, layers ``[B, L, D]``."""
        tensors = {f"heads.{index}": heads[:, index] for index in range(self._n_layers)}
        tensors |= {f"layer.{index}": layers[:, index] for index in range(self._n_layers)}
        write_safetensors(self._path(block), tensors)

    def read(self, kind: Literal["heads", "layer"], device: torch.device) -> Iterator[Tensor]:
        """Each layer's head outputs ``[N, H, d]``, or its own output ``[N, D]``, in the order of the samples."""
        place = torch.tensor([row for block in self.rows for row in block]).argsort()
        for index in range(self._n_layers):
            name = f"{kind}.{index}"
            parts = [safe_open(self._path(block), "pt").get_tensor(name) for block in range(len(self.rows))]
            yield torch.cat(parts)[place].to(device)

    def clear(self) -> None:
        """Deletes these features; those of other settings and of other people stay."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _is_whole(self, block: int) -> bool:
        try:
            with safe_open(self._path(block), "pt"):
                return True
        except FileNotFoundError:
            return False
        except SafetensorError as error:
            logger.warning("%s is damaged and computed again (%s).", self._path(block), error)
            return False


def compute_features(
    inputs: SelectionInputs, model: nn.Module, samples: Sequence[Sample], config: HeraConfig, folder: Path, key: str
) -> FeatureBlocks:
    """Runs all samples through the model, shared out over the processes of the launch.

    Blocks do not depend on the number of processes; those of a killed run under the same ``key`` are used again.
    """
    forward = Forward(model, config.select.mode, inputs.autocast)
    features = [sample.features for sample in samples]
    batches = plan_batches([len(feature["input_ids"]) for feature in features], config.select.batch_size)
    per_block = max(1, _BLOCK_SAMPLES // config.select.batch_size)
    plan = [batches[start : start + per_block] for start in range(0, len(batches), per_block)]
    rows = [[row for batch in block for row in batch] for block in plan]
    key = hashlib.sha256(json.dumps([key, [feature["input_ids"] for feature in features], rows]).encode()).hexdigest()
    blocks = FeatureBlocks(folder, key, rows, head_layout(model_config(model)).n_layers)
    missing = blocks.missing()
    barrier()  # nobody writes before everybody has looked
    if rank() == 0 and len(missing) < len(rows):
        logger.warning("%s: %d of %d blocks are there; going on.", blocks.folder, len(rows) - len(missing), len(rows))
    mine = missing[rank() :: world_size()]
    total = sum(len(rows[block]) for block in mine)
    parts: list[tuple[Tensor, Tensor]] = []
    bar = tqdm(total=total, desc="HeRA | scoring pass", unit="sample", disable=rank() != 0)
    with PooledHeads(model) as pooled, torch.no_grad(), bar:

        def run(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            pooled.pool(forward.tokens(config.pooling, batch))
            forward.run(batch)
            heads, layers = pooled.take()
            return heads.cpu(), layers.cpu()

        todo = [batch for block in mine for batch in plan[block]]
        last = {rows[block][-1]: block for block in mine}
        for batch, result in run_batches(todo, features, inputs.collator(model), run, inputs.num_workers):
            parts.append(result)
            if batch[-1] in last:
                heads, layers = map(torch.cat, zip(*parts, strict=True))
                blocks.write(last[batch[-1]], heads, layers)
                parts.clear()
            bar.update(len(batch))
    barrier()
    if unseen := blocks.missing():
        raise ValueError(
            f"output_dir: {blocks.folder} lacks {len(unseen)} blocks of other processes; all machines must share it."
        )
    barrier()  # nobody deletes them before everybody has seen them
    return blocks
