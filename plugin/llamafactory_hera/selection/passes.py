"""Forward passes of the model and the teacher before training, in batches that are halved when memory runs out."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..config import HeraConfig
from ..distributed import gather_objects, rank, world_size
from ..heads.families import head_layout, media_token_ids, model_config, text_decoder
from ..heads.probe import pooled_heads
from ..heads.targets import Pooling
from ..heads.tokens import token_mask
from ..teachers.cache import FeatureCache
from ..teachers.encoder import TeacherProcessor, VisionTeacher
from ..teachers.images import ImageLike, load_image
from .samples import Features, SelectionInputs

logger = logging.getLogger("llamafactory_hera")

#: The numbers of the samples in one forward pass.
Batch = tuple[int, ...]


class Forward:
    """Runs batches through a model without labels, a cache, or unneeded logits.

    The model is a transformers model, bare or under PEFT; ``llm`` runs only its text decoder. ``autocast`` is the half
    precision of the computation, if the weights have a different dtype.
    """

    def __init__(self, model: nn.Module, mode: str = "mllm", autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.media = media_token_ids(model_config(model))  #: Token ids of images and other media.
        self._module = text_decoder(model) if mode == "llm" else model
        self._autocast = autocast
        inner: Any = getattr(model, "get_base_model", lambda: model)()  # without PEFT, which hides the signature
        self._can_skip_logits = mode == "mllm" and "logits_to_keep" in inspect.signature(inner.forward).parameters

    def run(self, batch: dict[str, Any]) -> None:
        """Runs a batch only for the values that hooks capture."""
        # A tensor, because a number yields a noncontiguous slice, for which PyTorch copies lm_head for each sample.
        self._call(batch, torch.zeros(1, dtype=torch.long, device=self.device))

    def logits(self, batch: dict[str, Any], positions: Tensor) -> Tensor:
        """Computes the logits ``[B, P, V]`` at the positions ``[P]`` of every sample, on the device of the model."""
        logits = self._call(batch, positions).logits
        return logits if self._can_skip_logits else logits[:, positions]

    def tokens(self, pooling: Pooling, batch: dict[str, Any]) -> Tensor:
        """Marks the tokens that a pooling averages, boolean ``[B, T]`` on the device of the model."""
        attended, labels = batch.get("attention_mask"), batch.get("labels")
        return token_mask(pooling, batch["input_ids"], attended, labels, self.media).to(self.device)

    def _call(self, batch: dict[str, Any], keep: int | Tensor) -> Any:
        inputs = send_to_device({name: value for name, value in batch.items() if name != "labels"}, self.device)
        options = {"logits_to_keep": keep} if self._can_skip_logits else {}
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._module(**inputs, use_cache=False, **options)


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Groups samples of similar length, longest first, so padding is small and the first needs the most memory."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def run_batches(
    batches: list[Batch],
    features: Sequence[Features],
    collate: Callable[[list[Features]], Any],
    run: Callable[[Any], Any],
    num_workers: int = 0,
) -> Iterator[tuple[Batch, Any]]:
    """Yields each batch with the result of its pass; when memory runs out, the remaining batches are halved."""
    pending = list(batches)
    make = partial(_collated, features=features, collate=collate)
    while pending:
        dataset: Any = pending  # a DataLoader accepts any object with a length and items
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=make)
        for done, inputs in enumerate(loader):
            try:
                result = run(inputs)
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or len(pending[done]) == 1:
                    raise
                result = None
            if result is None:  # outside of the handler, which would keep the tensors of the failed pass
                limit = len(pending[done]) // 2
                rest = pending[done:]
                pending = [batch[start : start + limit] for batch in rest for start in range(0, len(batch), limit)]
                clear_device_cache()
                logger.warning("Out of memory: continuing with batches of %d samples.", limit)
                break
            yield pending[done], result
        else:
            return


def _collated(batch: Batch, features: Sequence[Features], collate: Callable[[list[Features]], Any]) -> Any:
    return collate([dict(features[row]) for row in batch])  # copies, because collators remove entries


def fill_cache(
    teacher: VisionTeacher, cache: FeatureCache, images: dict[bytes, ImageLike], batch_size: int, num_workers: int = 0
) -> None:
    """Computes the features that a cache lacks; a killed run continues after its last shard.

    All processes of a launch call this function together, each with its share of ``images``, which maps keys to
    images. Raises ``ValueError`` if an image cannot be decoded.
    """
    cache.refresh()
    keys = [key for key in images if key not in cache]
    missing = [{"image": images[key]} for key in keys]
    batches, collate = plan_batches([1] * len(keys), batch_size), partial(_pixels, processor=teacher.processor)
    bar = tqdm(total=len(keys), desc="HeRA | teacher", unit="image", delay=0.3, disable=rank() != 0)
    try:
        for batch, features in run_batches(batches, missing, collate, teacher.encode, num_workers):
            cache.put([keys[i] for i in batch], features)
            bar.update(len(batch))
    finally:
        bar.close()
        cache.flush()
    if world_size() > 1:
        dist.barrier()
    cache.refresh()  # reads the shards of the other processes


def _pixels(features: list[Features], processor: TeacherProcessor) -> Tensor:
    return processor.batch([load_image(feature["image"]) for feature in features])


def pooled_outputs(
    inputs: SelectionInputs, model: nn.Module, features: Sequence[Features], config: HeraConfig
) -> tuple[list[Tensor], Tensor]:
    """Runs all samples through the model; the processes of a launch share the work.

    Every process receives averages over tokens, in fp32 on the CPU: the head outputs of each layer ``[N, H, d]``, and
    the outputs of all layers ``[N, L, D]``.
    """
    forward, layout = Forward(model, config.select_mode, inputs.autocast), head_layout(model_config(model))
    heads = [torch.empty(len(features), layer.n_heads, layer.head_dim) for layer in layout.layers]
    layers = torch.empty(len(features), layout.n_layers, layout.hidden_size)
    batches = plan_batches([len(feature["input_ids"]) for feature in features], config.select_batch_size)
    batches = batches[rank() :: world_size()]
    rows = [row for batch in batches for row in batch]
    bar = tqdm(total=len(rows), desc="HeRA | scoring pass", unit="sample", disable=rank() != 0)

    def run(batch: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        return pooled_heads(model, forward.tokens(config.pooling, batch), partial(forward.run, batch))

    with bar:
        for batch, (of_heads, of_layers) in run_batches(
            batches, features, inputs.collator(model), run, inputs.num_workers
        ):
            layers[list(batch)] = of_layers.cpu()
            for stored, found in zip(heads, of_heads, strict=True):
                stored[list(batch)] = found.cpu()
            bar.update(len(batch))
    if world_size() > 1:
        for layer in range(layout.n_layers):  # one by one, because NCCL sends objects through device memory
            for of_rank, *outputs in gather_objects((rows, heads[layer][rows], layers[rows, layer])):
                heads[layer][of_rank], layers[of_rank, layer] = outputs
    return heads, layers
