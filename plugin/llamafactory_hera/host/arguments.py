# No `from __future__ import annotations` here: HfArgumentParser reads the annotations as types.
"""The ``hera_*`` keys of a run: each declared once, with its default and its help."""

import math
import os
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from llamafactory_hera.heads.head_set import HeadSet
from llamafactory_hera.heads.pooling import Pooling
from llamafactory_hera.selection.settings import Mode, StoredDtype, Strategy

Similarity = Literal["cosine", "dot"]
Accumulate = Literal["none", "gradcache"]

#: More heads than this wrecked a model in the paper (Qwen2.5-3B with m=10: All 54.2 -> 46.0).
MOST_HEADS = 5


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
    hera_weight: float = field(
        default=0.01, metadata={"help": "Weight (lambda) of the HeRA loss beside the language-modeling loss."}
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
            "help": "Heads to select: the least aligned (worst), the most (top), random ones, or the least aligned of "
            "the middle layer (middle)."
        },
    )
    hera_select_m: int = field(default=5, metadata={"help": "How many heads to select."})
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
        """Checks the values that need nothing but themselves, and normalises ``hera_heads`` to text.

        Raises:
            ValueError: Names the key, the value and the remedy.
        """
        if isinstance(self.hera_heads, (list, tuple)):  # a YAML list
            self.hera_heads = ",".join(map(str, self.hera_heads))
        for knob in fields(HeraArguments):
            if type(knob.default) in _READERS:
                setattr(self, knob.name, _typed(knob.name, getattr(self, knob.name), type(knob.default)))
        if not self.hera_heads:
            raise ValueError(
                "hera_heads: no head is named; write heads such as L13H12,L7H6, give a heads.json, or write auto."
            )
        if self.hera_heads != "auto":
            chosen = len(HeadSet.resolve(self.hera_heads).heads)
            if chosen > MOST_HEADS:
                warnings.warn(
                    f"hera_heads: {chosen} heads are more than the {MOST_HEADS} that the paper recommends; ten of "
                    "them wrecked Qwen2.5-3B there.",
                    stacklevel=2,
                )
        _at_least("hera_k", self.hera_k, 1)
        _at_least("hera_memory", self.hera_memory, 0)
        _at_least("hera_max_nan", self.hera_max_nan, 1)
        _finite("hera_weight", self.hera_weight, self.hera_weight >= 0, "0 or more, the paper uses 0.01")
        _finite(
            "hera_temperature", self.hera_temperature, self.hera_temperature > 0, "more than 0, the paper uses 0.07"
        )
        _one_of("hera_pooling", self.hera_pooling, get_args(Pooling))
        _one_of("hera_similarity", self.hera_similarity, get_args(Similarity))
        _one_of("hera_accumulate", self.hera_accumulate, get_args(Accumulate))
        self._check_selection()

    def _check_selection(self) -> None:
        _one_of("hera_select", self.hera_select, get_args(Strategy))
        _one_of("hera_select_mode", self.hera_select_mode, get_args(Mode))
        _one_of("hera_select_dtype", self.hera_select_dtype, get_args(StoredDtype))
        for key in ("hera_select_m", "hera_select_k", "hera_select_batch_size"):
            _at_least(key, getattr(self, key), 1)
        _at_least("hera_select_samples", self.hera_select_samples, self.hera_select_k + 2)
        gib = self.hera_select_memory_gb
        _finite("hera_select_memory_gb", gib, gib > 0, "more than 0, for instance 4")


def _read_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[str(value).lower()]


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _read_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


# the host's parser hands over what YAML made of a value, whatever the field's type
_READERS = {bool: (_read_bool, "true or false"), int: (_read_int, "a whole number"), float: (_read_float, "a number")}


def _typed(key: str, value: Any, kind: type) -> Any:
    reader, expected = _READERS[kind]
    try:
        return reader(value)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{key}: {value!r} is not {expected}; write {expected}.") from error


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}: {value} is too small; choose {least} or more.")


def _finite(key: str, value: float, in_range: bool, remedy: str) -> None:
    if not (math.isfinite(value) and in_range):
        raise ValueError(f"{key}: {value} is out of range; choose {remedy}.")


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: {value!r} is unknown; choose one of {', '.join(choices)}.")


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
