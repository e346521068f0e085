"""What can be set about a selection."""

from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["llm", "mllm"]
Strategy = Literal["worst", "top", "random", "middle"]
StoredDtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class SelectSettings:
    """Settings of a selection; the defaults are those of the ``hera_*`` keys of the same meaning.

    Attributes:
        mode: ``llm`` feeds captions to the language model alone (paper), ``mllm`` image and text to the whole model.
        samples: Image-caption pairs to score on.
        k: Neighbours per sample.
        strategy: Which heads are taken, see :func:`~.strategies.choose_heads`.
        m: How many heads are taken.
        batch_size: Samples in a forward pass on one process.
        seed: Of the draw of samples, and of ``random`` heads.
        stored_dtype: Precision in which head outputs wait on disk for scoring.
        memory_gb: Bound on the working memory of scoring, in GiB.
        pooling: Tokens that a head's output is averaged over.
        similarity: ``cosine`` or ``dot``, for both sides.
        image_index: Which image of a sample with several is the sample's image.
    """

    mode: Mode = "llm"
    samples: int = 1000
    k: int = 10
    strategy: Strategy = "worst"
    m: int = 5
    batch_size: int = 16
    seed: int = 0
    stored_dtype: StoredDtype = "fp32"
    memory_gb: float = 4.0
    pooling: str = "answer"
    similarity: str = "cosine"
    image_index: int = 0

    @classmethod
    def from_arguments(cls, arguments: Any) -> "SelectSettings":
        """Reads the ``hera_*`` keys off an arguments object."""
        return cls(
            mode=arguments.hera_select_mode,
            samples=arguments.hera_select_samples,
            k=arguments.hera_select_k,
            strategy=arguments.hera_select,
            m=arguments.hera_select_m,
            batch_size=arguments.hera_select_batch_size,
            seed=arguments.hera_select_seed,
            stored_dtype=arguments.hera_select_dtype,
            memory_gb=arguments.hera_select_memory_gb,
            pooling=arguments.hera_pooling,
            similarity=arguments.hera_similarity,
            image_index=arguments.hera_image_index,
        )

    @property
    def memory_bytes(self) -> int:
        """``memory_gb`` in bytes."""
        return int(self.memory_gb * 2**30)
