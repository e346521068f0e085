"""How a global batch is spread over GPUs, and the memory that takes: computed from tensor sizes, not measured."""

from dataclasses import dataclass

from .sizes import Sizes

GIB = 2**30

#: Bytes of a trained parameter: fp32 weight and gradient, two AdamW moments. ZeRO-3 keeps as much, in other shares.
TRAINED_BYTES = 16
#: Bytes of a logit while the loss is taken: the bf16 logit, its fp32 copy, the softmax and the gradient.
LOGIT_BYTES = 14
#: Bytes of a parameter that bitsandbytes keeps in 4 bits, with its share of the quantization constants.
NF4_BYTES = 0.56
#: CUDA context, DINOv2-L in bf16 with its activations, the vision tower's activations, fragmentation.
OVERHEAD = 5 * GIB
#: A card must keep some room.
USABLE = 0.9
#: Samples that are compared at least: this project's choice, as many as LLaVA's stage 2 has in its global batch. The
#: paper does not say within what it compares.
CANDIDATES = 128


@dataclass(frozen=True)
class Work:
    """What a recipe trains.

    Attributes:
        sizes: Of the model.
        n_frozen: Frozen parameters.
        n_trained: Trained parameters.
        tokens: Length of a padded sequence.
        global_batch: Samples between two optimizer steps.
        card: Memory of a GPU in GiB.
        zero3: Parameters are sharded over all GPUs.
        four_bit: The frozen linear layers are kept in 4 bits.
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
        """GiB of a checkpoint with the optimizer's state: bf16 weights, fp32 copies and two moments."""
        return (2 * self.n_frozen + 14 * self.n_trained) / GIB

    def memory(self, gpus: int, per_device: int) -> float:
        """GiB a GPU with gradient checkpointing, an estimate on the high side."""
        sizes = self.sizes
        embeddings = sizes.hidden * sizes.vocabulary * (1 if sizes.tied else 2)
        frozen = 2.0 * self.n_frozen
        if self.four_bit:
            frozen = 2.0 * embeddings + NF4_BYTES * (self.n_frozen - embeddings)
        weights = frozen + TRAINED_BYTES * self.n_trained
        if self.zero3:
            gathered = 2.0 * 2 * embeddings  # the largest parameters, whole while they are used
            weights = weights / gpus + gathered
        checkpoints = 2 * sizes.layers * sizes.hidden
        one_layer = 2 * (8 * sizes.hidden + 6 * sizes.intermediate)
        per_token = checkpoints + one_layer + LOGIT_BYTES * sizes.vocabulary
        return (weights + per_device * self.tokens * per_token + OVERHEAD) / GIB


@dataclass(frozen=True)
class Batches:
    """A way to make the global batch on some number of GPUs."""

    gpus: int
    per_device: int
    accumulation: int
    hera_memory: int
    gib: float
    fits: bool


def spread(work: Work, gpus: int) -> Batches:
    """The largest micro-batch that fits, and the remembered samples that make up for what accumulation takes away.

    HeRA compares the samples of a micro-batch over all GPUs. Where that is less than the global batch, `hera_memory`
    brings the candidates up to it, or to `CANDIDATES` where the global batch itself is smaller.
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
