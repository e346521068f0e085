# No `from __future__ import annotations` here: the annotations are read as types.
"""Declares every ``hera_*`` key of a run."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .heads.paper import PAPER
from .heads.targets import AUTO, NAMED_LAYERS, Granularity, Pooling, Targets, hub_id
from .keys import KeyedConfig, knob

if TYPE_CHECKING:
    from .objectives import Objective

Strategy = Literal["worst", "top", "random", "middle"]
#: The model whose heads are scored. ``hera_select_mode`` also allows ``auto``, which resolves to either mode.
Mode = Literal["llm", "mllm"]

#: The sample counts that ``hera_select_samples: auto`` tries in turn; model outputs take about 1 MB per sample.
AUTO_SAMPLES = (1000, 2000, 4000, 8000)

_MOST_HEADS = 5  # with ten heads, the paper's Qwen2.5-3B collapsed (the average "All" fell from 54.2 to 46.0)

#: The keys that decide which heads a selection chooses; ``auto`` reuses a selection made with the same values.
SELECTION_KEYS = (
    "hera_select",
    "hera_select_m",
    "hera_select_mixers",
    "hera_select_mode",
    "hera_select_samples",
    "hera_select_k",
    "hera_select_seed",
    "hera_pooling",
    "hera_similarity",
)
#: The keys whose values must agree in two score files before the files can be compared.
SCORE_KEYS = ("hera_select_mode", "hera_select_k", "hera_pooling", "hera_similarity")
#: The keys whose values a resumed run must share with its checkpoint.
FIXED_KEYS = (
    "hera_objective",
    "hera_granularity",
    "hera_projector",
    "hera_visual_attention",
    "hera_pooling",
    "hera_similarity",
)
#: The keys that a resumed run may change; the run then warns that its curves do not continue the checkpoint's.
RESUMABLE_KEYS = ("hera_weight", "hera_k", "hera_objective_lr", "hera_memory", "hera_accumulate", "hera_image_index")
#: The keys that only some objectives read; ``Objective.reads`` lists the keys of each objective.
OBJECTIVE_KEYS = (
    "hera_k",
    "hera_temperature",
    "hera_projector",
    "hera_visual_attention",
    "hera_objective_lr",
    "hera_objective_from",
    "hera_teacher_cache",
    "hera_pooling",
    "hera_similarity",
    "hera_memory",
    "hera_accumulate",
)


@dataclass(frozen=True)
class HeraConfig(KeyedConfig):
    """The settings of a HeRA run: the field ``x`` is the key ``hera_x``. Defaults follow the paper where possible."""

    PREFIX: ClassVar[str] = "hera_"

    heads: str | None = knob(
        AUTO,
        "Attention heads to align. auto selects them before training; otherwise, give names such as L13H12,L7H6 "
        "(layer and head, zero-based), the path of a heads.json file, a hub id such as hf:owner/name, or paper "
        "(table 5).",
    )
    objective: str = knob(
        "contrastive",
        "The alignment loss: contrastive (HeRA's loss over neighbors), feature or viral (visual tokens match the "
        "teacher's patches), gram (token similarities match patch similarities), jarvis (predicts hidden patches), "
        "ross (predicts noise in an autoencoder's latents), cka (1 - CKA over the batch), or your own class, written "
        "as my_package.my_module:MyObjective.",
    )
    granularity: Granularity = knob(
        "head", "Align attention heads (head, with hera_heads) or decoder layers (layer, with hera_layers)."
    )
    layers: str | None = knob(
        AUTO,
        "Decoder layers to align with hera_granularity: layer. auto selects them before training; otherwise, give "
        "names such as L14,L15 (zero-based), the path of a layers.json file, middle, penultimate, or final (the last "
        "norm's output).",
    )
    weight: float = knob(
        0.01, "Weight (lambda) of the alignment loss relative to the language-modeling loss.", at_least=0, at_most=1000
    )
    k: int = knob(10, "Number of nearest neighbors per sample in the teacher's space.", at_least=1, at_most=10**6)
    temperature: float = knob(
        0.07, "Initial temperature of the contrastive loss; its logarithm is learned.", at_least=0.001, at_most=100
    )
    projector: Literal["shared", "separate"] = knob(
        "shared",
        "Projector in feature and viral: one for all heads or layers, with three linear layers and SiLU (shared), or "
        "one for each head or layer, with two linear layers and GELU (separate).",
    )
    visual_attention: Literal["causal", "two_way"] = knob(
        "causal",
        "Attention in jarvis: visual tokens see only earlier tokens (causal), or each other in both directions, as in "
        "the authors' code (two_way). Other programs do not reproduce two_way attention at inference.",
    )
    objective_lr: float | None = knob(
        None,
        "Peak learning rate of the objective's parameters, such as the temperature; 0 keeps their initial values. The "
        "default is the run's learning rate.",
        at_least=0,
        at_most=10,
    )
    objective_from: str | None = knob(
        None, "Load the objective's parameters from the output folder of this earlier run."
    )
    teacher: str = knob(
        "facebook/dinov2-large", "Frozen vision teacher (for ross, an autoencoder): a local folder or a hub id."
    )
    teacher_cache: str | None = knob(None, "Folder where runs cache teacher features, indexed by image content.")
    pooling: Pooling = knob(
        "answer",
        "Tokens over which a head's output is averaged: labeled tokens (answer), all text tokens (text), all tokens "
        "except padding (mean), or only the last token (last).",
    )
    similarity: Literal["cosine", "dot"] = knob(
        "cosine", "Similarity of representations: cosine similarity (cosine) or dot product (dot)."
    )
    memory: int | Literal["auto"] = knob(
        AUTO,
        "Number of recent samples to keep as additional candidates. auto keeps just enough samples for four times "
        "hera_k candidates, or none if the batch alone has that many.",
        at_least=0,
        at_most=10**6,
    )
    accumulate: Literal["none", "gradcache"] = knob(
        "none",
        "Candidates under gradient accumulation: the samples of one micro-batch (none), or of all micro-batches of "
        "an optimizer step, at the cost of a second forward pass (gradcache).",
    )
    image_index: int = knob(
        0, "Index of the image that the teacher sees if a sample has several; negative values count from the end."
    )
    max_nan: int = knob(
        10, "The run stops after this many consecutive micro-batches with a non-finite HeRA term.", at_least=1
    )
    heads_force: bool = knob(
        False, "Train heads even if they were selected for a different model, teacher or number of heads."
    )
    select: Strategy = knob(
        "worst",
        "Heads or layers to select: the least aligned (worst), the most aligned (top), a random choice (random), or "
        "the least aligned heads of the middle layer (middle).",
    )
    select_m: int = knob(5, "Number of heads or layers to select.", at_least=1)
    select_mode: Literal["auto", "llm", "mllm"] = knob(
        AUTO,
        "Model in which heads are scored: only the language model, with captions as input (llm), or the full model, "
        "with images and text (mllm). auto means llm for a model made by llamafactory-hera build, and for a run that "
        "trains the projector and freezes the language model; otherwise, it means mllm.",
    )
    select_mixers: Literal["attention", "all"] = knob(
        "attention",
        "Layers whose heads may be selected: those with softmax attention (attention), or also those with linear "
        "attention (all).",
    )
    select_dataset: str | None = knob(
        None, "Name of the dataset for scoring the heads; the default is the training dataset."
    )
    select_samples: int | Literal["auto"] = knob(
        1000,
        "Number of image-caption pairs for scoring the heads, at least hera_select_k + 2. auto begins with 1,000 and "
        "doubles the number, up to 8,000 or the end of the data, until 60% of the heads are each chosen again by most "
        "random halves of the pairs.",
        at_least=1,
        at_most=10**7,
    )
    select_k: int = knob(
        10, "Nearest neighbors per sample for scoring the heads; at most half of the other samples.", at_least=1
    )
    select_batch_size: int = knob(
        16,
        "Samples per device in each forward pass of the selection; the number is halved if memory runs out.",
        at_least=1,
        at_most=10**5,
    )
    select_seed: int = knob(0, "Seed for sampling the pairs, and for choosing heads if hera_select is random.")

    @property
    def targets_key(self) -> str:
        """The key that lists the heads or layers to align."""
        return "hera_layers" if self.granularity == "layer" else "hera_heads"

    @property
    def named_targets(self) -> str:
        """The heads or layers to align, as written: names, a path, ``auto``, or a layer such as ``middle``."""
        return (self.layers if self.granularity == "layer" else self.heads) or AUTO

    @property
    def normalize(self) -> bool:
        """True for cosine similarity, false for the dot product."""
        return self.similarity == "cosine"

    @property
    def gradcache(self) -> bool:
        """True if samples are compared across the micro-batches of an optimizer step."""
        return self.accumulate == "gradcache" and self.reads("hera_accumulate")

    @property
    def remembered(self) -> int | None:
        """The number of samples to remember, or None if it depends on the batch; 0 if the objective has no memory."""
        if not self.reads("hera_memory"):
            return 0
        return self.memory if isinstance(self.memory, int) else None

    @property
    def most_samples(self) -> int:
        """The largest number of samples on which heads are scored."""
        return AUTO_SAMPLES[-1] if self.select_samples == AUTO else int(self.select_samples)

    def check_batch(self, size: int, steps: int, processes: int, packed: bool = False) -> int:
        """Returns how many samples (or packed rows) are compared at once; refuses fewer than the objective needs."""
        from .objectives import TokenObjective

        objective, together = self.objective_class(), size * processes * (steps if self.gradcache else 1)
        least = objective.least_samples
        if packed and issubclass(objective, TokenObjective):
            raise ValueError(
                f"hera_objective: {self.objective} reads the visual tokens of one sample per row, but packed rows "
                "contain several samples; choose contrastive or cka, or disable packing."
            )
        if not packed and self.remembered is not None and together + self.remembered < least:
            memory = "set hera_memory: auto, " if self.reads("hera_memory") else ""
            raise ValueError(
                f"per_device_train_batch_size: {size} gives a global batch of {together}, but hera_objective: "
                f"{self.objective} needs {least} samples; raise the value, use more processes, {memory}or, under "
                "gradient accumulation, set hera_accumulate: gradcache."
            )
        return together

    def objective_class(self) -> "type[Objective]":
        """Returns the class of the objective."""
        from .objectives import find  # imports torch, which commands that only read scores do not need

        return find(self.objective)

    def reads(self, key: str) -> bool:
        """Returns whether the objective reads a key of ``OBJECTIVE_KEYS``."""
        return key in self.objective_class().reads

    def check(self) -> None:
        """Checks that the values are compatible."""
        if not self.teacher:
            raise ValueError("hera_teacher: the value is empty; give a folder or a hub id (facebook/dinov2-large).")
        if self.most_samples < self.select_k + 2:
            raise ValueError(
                f"hera_select_samples: {self.select_samples} is out of range; choose {self.select_k + 2} or more, so "
                "that each sample has more candidates than neighbors."
            )
        self._check_targets()
        self._check_objective()

    def _check_targets(self) -> None:
        other, value = ("hera_heads", self.heads) if self.granularity == "layer" else ("hera_layers", self.layers)
        if value not in (None, "", AUTO):
            raise ValueError(
                f"{other}: {value} needs hera_granularity: {'head' if other == 'hera_heads' else 'layer'}; set it, "
                f"or remove {other} ({other}=auto on a command line)."
            )
        named = self.named_targets
        auto = named == AUTO or hub_id(named, self.targets_key) is not None
        if self.granularity == "layer":
            if auto and self.select == "middle":
                raise ValueError("hera_select: middle selects only heads; for that layer, set hera_layers: middle.")
            if not auto and named not in NAMED_LAYERS:
                Targets.parse(named, "layer")
            return
        chosen = self.select_m if auto or named == PAPER else len(Targets.parse(named).items)
        if chosen > _MOST_HEADS:
            key = "hera_select_m" if auto else "hera_heads"
            advice = f"more than the {_MOST_HEADS} that the paper recommends; with ten, one of its models collapsed"
            warnings.warn(f"{key}: {chosen} heads are {advice}.", stacklevel=5)

    def _check_objective(self) -> None:
        objective = self.objective_class()
        if self.granularity not in objective.granularities:
            raise ValueError(
                f"hera_granularity: {self.granularity} does not work with hera_objective: {self.objective}; set "
                f"hera_granularity: {' or '.join(objective.granularities)}."
            )
        values, declared = self.keys(), self.knobs()
        for key in OBJECTIVE_KEYS:
            # hera_memory: 0 suits every objective
            if key not in objective.reads and values[key] not in (declared[key].default, 0):
                warnings.warn(
                    f"{key}: {values[key]} has no effect with hera_objective: {self.objective}, which does not read "
                    "it; remove the key.",
                    stacklevel=5,
                )


def selection_keys(config: HeraConfig) -> dict[str, Any]:
    """Returns the keys that decide a selection, with their values, as ``heads.json`` stores them."""
    values = config.keys()
    return {key: values[key] for key in SELECTION_KEYS}
