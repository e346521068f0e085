"""Splits a global batch over GPUs, and estimates the memory from tensor sizes without measuring it."""

from dataclasses import dataclass

from .sizes import Sizes

GIB = 2**30

#: Bytes per trained parameter: fp32 weight and gradient, two AdamW moments. ZeRO-3 shards the same bytes across GPUs.
TRAINED_BYTES = 16
#: Bytes per logit while the loss is computed: the bf16 logit, its fp32 copy, the softmax and the gradient.
LOGIT_BYTES = 14
#: Bytes per parameter that bitsandbytes stores in 4 bits, including the quantization constants.
NF4_BYTES = 0.56
#: The CUDA context, DINOv2-L in bf16, its activations and the vision tower's, and fragmentation.
OVERHEAD = 5 * GIB
#: The fraction of a card that a recipe may fill.
USABLE = 0.9
#: The smallest number of samples to compare. The paper gives no number, so this is LLaVA's stage 2 global batch.
CANDIDATES = 128


@dataclass(frozen=True)
class Work:
    """The amount of training in a recipe.

    Attributes:
        sizes: Sizes of the model.
        n_frozen: Number of frozen parameters.
        n_trained: Number of trained parameters.
        tokens: Length of a padded sequence.
        global_batch: Samples per optimizer step.
        card: Memory of a GPU in GiB.
        zero3: True if the parameters are sharded over all GPUs.
        four_bit: True if the frozen linear layers are stored in 4 bits.
    """

    sizes: Sizes
    n_frozen: int
    n_trained: int
    tokens: int
    global_batch: int
    card: int = 80
    zero3: bool = False
    four_bit: bool = False

    @property
    def checkpoint(self) -> float:
        """The size in GiB of a checkpoint with optimizer state: bf16 weights, fp32 copies and two moments."""
        return (2 * self.n_frozen + 14 * self.n_trained) / GIB

    def memory(self, gpus: int, per_device: int) -> float:
        """Returns a high estimate of the memory per GPU in GiB, with gradient checkpointing."""
        sizes = self.sizes
        frozen = 2.0 * self.n_frozen
        if self.four_bit:
            frozen = 2.0 * sizes.embeddings + NF4_BYTES * (self.n_frozen - sizes.embeddings)
        weights = frozen + TRAINED_BYTES * self.n_trained
        if self.zero3:
            gathered = 2.0 * 2 * sizes.embeddings  # the largest parameters, gathered while they are in use
            weights = weights / gpus + gathered
        checkpoints = 2 * sizes.layers * sizes.hidden
        one_layer = 2 * (8 * sizes.hidden + 6 * sizes.intermediate)
        per_token = checkpoints + one_layer + LOGIT_BYTES * sizes.vocabulary
        return (weights + per_device * self.tokens * per_token + OVERHEAD) / GIB


@dataclass(frozen=True)
class Batches:
    """One way to split the global batch over a number of GPUs."""

    gpus: int
    per_device: int
    accumulation: int
    hera_memory: int
    gib: float
    fits: bool


def spread(work: Work, gpus: int) -> Batches:
    """Chooses the largest micro-batch that fits, and the ``hera_memory`` that replaces the missing candidates.

    HeRA compares the samples of the micro-batches on all GPUs. If they are fewer than the global batch or
    ``CANDIDATES``, ``hera_memory`` adds samples up to the larger of the two.
    """
    choices = [size for size in (32, 16, 8, 4, 2, 1) if size * gpus <= work.global_batch]
    fitting = [size for size in choices if work.memory(gpus, size) <= USABLE * work.card]
    per_device = fitting[0] if fitting else min(choices[0], 4)
    candidates = gpus * per_device
    return Batches(
        gpus=gpus,
        per_device=per_device,
        accumulation=work.global_batch // candidates,
        hera_memory=max(work.global_batch, CANDIDATES) - candidates,
        gib=work.memory(gpus, per_device),
        fits=bool(fitting),
    )
