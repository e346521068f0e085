# No `from __future__ import annotations` here: HfArgumentParser reads the annotations as types.
"""The ``hera_*`` keys of a run: each declared once, with its default and its help."""

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from llamafactory_hera.heads.pooling import Pooling
from llamafactory_hera.selection.settings import Mode, StoredDtype, Strategy

from .argument_checks import Accumulate, Granularity, Similarity, check_values
from .argument_values import READERS, typed


@dataclass
class HeraArguments:
    """Keys of ``stage: hera``."""

    hera_heads: str | None = field(
        default=None,
        metadata={
            "help": (
                "Attention heads to align: names such as L13H12,L7H6 (layer and head, zero-based), the path of a "
                "heads.json, or auto to select them before training."
            )
        },
    )
    hera_objective: str = field(
        default="contrastive",
        metadata={
            "help": (
                "What is minimised: HeRA's loss over neighbours (contrastive), the cosine of projected features "
                "(feature), 1 - CKA over the batch (cka), visual tokens against the teacher's patches (viral), or an "
                "objective registered by name."
            )
        },
    )
    hera_granularity: Granularity = field(
        default="head",
        metadata={"help": "Align attention heads (head, hera_heads) or decoder layers (layer, hera_layers)."},
    )
    hera_layers: str | None = field(
        default=None,
        metadata={
            "help": (
                "Decoder layers to align under hera_granularity layer: names such as L14,L15 (zero-based), the path "
                "of a layers.json, middle, penultimate, or auto to select them before training."
            )
        },
    )
    hera_weight: float = field(
        default=0.01, metadata={"help": "Weight (lambda) of the alignment loss beside the language-modeling loss."}
    )
    hera_k: int = field(default=10, metadata={"help": "Nearest neighbours in the teacher's space per sample."})
    hera_temperature: float = field(
        default=0.07, metadata={"help": "Initial softmax temperature of the contrastive loss, learned in log scale."}
    )
    hera_fixed_temperature: bool = field(
        default=False, metadata={"help": "Keep the temperature at its initial value instead of learning it."}
    )
    hera_teacher: str = field(
        default="facebook/dinov2-large",
        metadata={"help": "Frozen vision teacher: a local folder or the id of a hub model."},
    )
    hera_teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps teacher features by image content; filled while training."},
    )
    hera_pooling: Pooling = field(
        default="answer",
        metadata={
            "help": (
                "Tokens that a head's output is averaged over: those with a label (answer), all text (text), all but "
                "padding (mean), or the last one (last)."
            )
        },
    )
    hera_similarity: Similarity = field(
        default="cosine", metadata={"help": "Similarity of representations: cosine, or the plain dot product (dot)."}
    )
    hera_memory: int = field(
        default=0,
        metadata={
            "help": "Recent samples kept as further candidates, for global batches below hera_k + 1; 0 for none."
        },
    )
    hera_accumulate: Accumulate = field(
        default="none",
        metadata={
            "help": (
                "Candidates under gradient accumulation: those of the micro-batch (none), or of all micro-batches of "
                "the step at the price of one more forward pass (gradcache)."
            )
        },
    )
    hera_image_index: int = field(
        default=0,
        metadata={"help": "Which image of a sample with several the teacher sees; negative counts from the last."},
    )
    hera_max_nan: int = field(
        default=10, metadata={"help": "Steps in a row with a non-finite HeRA term after which the run stops."}
    )
    hera_heads_force: bool = field(
        default=False,
        metadata={"help": "Train with a heads.json that was selected on another model or teacher, or with another m."},
    )
    hera_select: Strategy = field(
        default="worst",
        metadata={
            "help": "Heads or layers to select: the least aligned (worst), the most (top), random ones, or the least "
            "aligned heads of the middle layer (middle)."
        },
    )
    hera_select_m: int = field(default=5, metadata={"help": "How many heads or layers to select."})
    hera_select_mode: Mode = field(
        default="llm",
        metadata={
            "help": "Select on the language model alone, fed with captions (llm), or on the whole model with image "
            "and text (mllm)."
        },
    )
    hera_select_samples: int = field(default=1000, metadata={"help": "Image-caption pairs to score the heads on."})
    hera_select_k: int = field(default=10, metadata={"help": "Nearest neighbours per sample when scoring heads."})
    hera_select_batch_size: int = field(
        default=16,
        metadata={"help": "Samples per device in a forward pass of the selection; halved if memory runs out."},
    )
    hera_select_seed: int = field(
        default=0, metadata={"help": "Seed of the draw of samples, and of the heads of hera_select: random."}
    )
    hera_select_dtype: StoredDtype = field(
        default="fp32", metadata={"help": "Precision in which head outputs are stored for scoring: fp32 or fp16."}
    )
    hera_select_memory_gb: float = field(
        default=4.0, metadata={"help": "Bound on the working memory of scoring, in GiB."}
    )

    def check_hera(self) -> None:
        """Checks the values that need nothing but themselves; heads and layers become text.

        Raises:
            ValueError: Names the key, the value and the remedy.
        """
        for key in ("hera_heads", "hera_layers"):
            value = getattr(self, key)
            if isinstance(value, (list, tuple)):  # a YAML list
                setattr(self, key, ",".join(map(str, value)))
            elif value is not None:  # a bare number, say, which is then refused as any other word
                setattr(self, key, str(value))
        for knob in fields(HeraArguments):
            if type(knob.default) in READERS:
                setattr(self, knob.name, typed(knob.name, getattr(self, knob.name), type(knob.default)))
        check_values(self)


def _bypasses(arguments: Any) -> str | None:
    """The setting, if any, under which the host never reaches the trainer that HeRA extends."""
    if getattr(arguments, "use_hyper_parallel", False):
        return "use_hyper_parallel: true"
    if os.environ.get("USE_MCA", "0").lower() in ("true", "y", "1"):
        return "USE_MCA=1"
    if getattr(arguments, "use_asft_loss", False):
        return "use_asft_loss: true"
    return None


def extend(host: type) -> type:
    """A subclass of the host's ``FinetuningArguments`` with the HeRA keys and ``stage: hera``.

    Inside the host a HeRA run is ``stage: sft`` with ``use_hera`` set; ``to_dict`` reports ``hera`` again.
    """
    host_stage = host.__dataclass_fields__["stage"]

    @dataclass
    class FinetuningArguments(HeraArguments, host):
        stage: Literal[(*get_args(host_stage.type), "hera")] = field(
            default=host_stage.default, metadata=dict(host_stage.metadata)
        )

        def __post_init__(self) -> None:
            self.use_hera = self.stage == "hera"
            if self.use_hera:
                self.stage = "sft"
            super().__post_init__()
            if self.use_hera:
                setting = _bypasses(self)
                if setting is not None:
                    raise ValueError(f"stage: hera does not work with {setting}; remove that setting.")
                self.check_hera()

        def to_dict(self) -> dict[str, Any]:
            content = super().to_dict()
            if self.use_hera:
                return {**content, "stage": "hera"}
            return {key: value for key, value in content.items() if not key.startswith("hera_")}

    # pickle finds the class where the host has it
    FinetuningArguments.__module__ = host.__module__
    FinetuningArguments.__qualname__ = host.__qualname__
    FinetuningArguments.__doc__ = host.__doc__
    return FinetuningArguments
