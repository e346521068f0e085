"""The forward passes: every head's and layer's pooled output of every sample, written as it is made."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..alignment.gather import barrier, rank, world_size
from ..heads.families import head_layout, media_token_ids, model_config
from ..heads.pooled import PooledHeads, text_decoder
from ..heads.pooling import token_mask
from .batches import Batch, plan_batches, run_batches
from .blocks import FeatureBlocks
from .draw import Sample
from .material import Material
from .settings import Mode, SelectSettings

logger = logging.getLogger(__name__)

# What the model takes no part of.
_NOT_INPUTS = ("labels",)


def forward_call(model: nn.Module, mode: Mode) -> Callable[[dict[str, Any]], None]:
    """How a batch goes through the model: the language model alone, or the whole, without logits that nobody reads.

    Args:
        model: As loaded, bare or under PEFT.
        mode: ``llm`` or ``mllm``.

    Returns:
        A function of the batch's tensors, which are moved to the model's device.
    """
    device = next(model.parameters()).device
    target = text_decoder(model) if mode == "llm" else model
    options: dict[str, Any] = {"use_cache": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if mode == "mllm" and "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = 1

    def call(batch: dict[str, Any]) -> None:
        inputs = {name: _to(value, device) for name, value in batch.items() if name not in _NOT_INPUTS}
        target(**inputs, **options)

    return call


def compute_features(
    model: nn.Module,
    samples: Sequence[Sample],
    material: Material,
    settings: SelectSettings,
    folder: Path,
    key: str,
) -> FeatureBlocks:
    """Runs all samples through the model, shared out over the processes of the launch.

    Args:
        model: Whole on this process, in evaluation mode.
        samples: N samples, the same on every process.
        material: For its collator and worker processes.
        settings: Of the selection.
        folder: Where the blocks' folder is made.
        key: Digest of model and settings; features of the same key are taken from an earlier, killed run.

    Returns:
        The complete blocks of features.

    Raises:
        ValueError: The output folder cannot be written, or other processes' blocks cannot be seen in it.
    """
    features = [sample.features for sample in samples]
    batches = plan_batches([len(feature["input_ids"]) for feature in features], settings.batch_size)
    n_blocks = batches[-1].block + 1
    rows = [[row for batch in batches if batch.block == block for row in batch.rows] for block in range(n_blocks)]
    key = hashlib.sha256(json.dumps([key, [feature["input_ids"] for feature in features], rows]).encode()).hexdigest()
    layout = head_layout(model_config(model))
    blocks = FeatureBlocks(folder, key, rows, layout, settings.stored_dtype)
    missing = blocks.missing()
    barrier()  # nobody writes before everybody has looked
    if rank() == 0 and len(missing) < n_blocks:
        logger.warning("%s: %d of %d blocks are there; going on.", blocks.folder, n_blocks - len(missing), n_blocks)
    mine = set(missing[rank() :: world_size()])
    _run(model, [batch for batch in batches if batch.block in mine], features, blocks, material, settings)
    barrier()
    unseen = blocks.missing()
    if unseen:
        raise ValueError(
            f"output_dir: {blocks.folder} lacks {len(unseen)} blocks that other processes wrote; on several machines "
            "it must be a folder that all of them share."
        )
    barrier()  # nobody deletes them before everybody has seen them
    return blocks


def _run(
    model: nn.Module,
    batches: list[Batch],
    features: list[dict[str, Any]],
    blocks: FeatureBlocks,
    material: Material,
    settings: SelectSettings,
) -> None:
    call = forward_call(model, settings.mode)
    collate = material.collator(model)
    device = next(model.parameters()).device
    media = media_token_ids(model_config(model))
    autocast = torch.autocast(device.type, material.autocast) if material.autocast is not None else nullcontext()
    waiting: dict[int, tuple[Tensor, Tensor]] = {}  # row -> its heads and layers
    with (
        ThreadPoolExecutor(1) as writer,  # a block is written while the next one is computed
        PooledHeads(model) as pooled,
        torch.no_grad(),
        autocast,
        tqdm(
            total=sum(len(batch.rows) for batch in batches),
            desc="HeRA | scoring pass",
            unit="sample",
            disable=rank() != 0,
        ) as bar,
    ):

        def run(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            mask = token_mask(
                settings.pooling, batch["input_ids"], batch.get("attention_mask"), batch.get("labels"), media
            )
            pooled.pool(mask.to(device))
            call(batch)
            heads, layers = pooled.take()
            return heads.cpu(), layers.cpu()

        written = writer.submit(lambda: None)
        for batch, (heads, layers) in run_batches(batches, features, collate, run, material.num_workers):
            waiting.update(zip(batch.rows, zip(heads, layers, strict=True), strict=True))
            rows = blocks.rows[batch.block]
            if all(row in waiting for row in rows):
                written.result()
                block_heads, block_layers = zip(*(waiting.pop(row) for row in rows), strict=True)
                written = writer.submit(blocks.write, batch.block, torch.stack(block_heads), torch.stack(block_layers))
            bar.update(len(batch.rows))
        written.result()


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
