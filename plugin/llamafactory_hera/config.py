# No `from __future__ import annotations` here: the annotations are read as types.
"""Every ``hera_*`` key of a run, once; ``knobs.py`` says what a key declares and who reads it."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .heads.targets import AUTO, NAMED_LAYERS, Granularity, Pooling, Targets
from .knobs import KeyedConfig, Role, knob

_MOST_HEADS = 5  # more wrecked a model in the paper (Qwen2.5-3B with m=10: All 54.2 -> 46.0)

_READING = (Role.SELECTS, Role.SCORES, Role.FIXED)  # what a head's score depends on
Strategy = Literal["worst", "top", "random", "middle"]
Mode = Literal["llm", "mllm"]
StoredDtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class SelectConfig(KeyedConfig):
    """Keys of a selection of heads or layers; a field ``x`` is the key ``hera_select_x``."""

    PREFIX: ClassVar[str] = "hera_select_"

    strategy: Strategy = knob(
        "worst",
        "Heads or layers to select: the least aligned (worst), the most (top), random ones, or the least aligned "
        "heads of the middle layer (middle).",
        Role.SELECTS,
        key="hera_select",
    )
    m: int = knob(5, "How many heads or layers to select.", Role.SELECTS, Role.TRAINS, at_least=1)
    mode: Mode = knob(
        "llm",
        "Select on the language model alone, fed with captions (llm), or on the whole model with image and text "
        "(mllm).",
        Role.SELECTS,
        Role.SCORES,
    )
    dataset: str | None = knob(
        None,
        "Dataset of dataset_dir to score the heads on, by default the one that is trained on; its images lie in "
        "dataset_dir/NAME/images, or else in media_dir.",
        Role.SELECTS,
        fact="dataset",
    )
    samples: int = knob(
        1000, "Image-caption pairs to score heads on.", Role.SELECTS, at_least=1, at_most=10**7, fact="samples_asked"
    )
    k: int = knob(10, "Nearest neighbors per sample when scoring heads.", Role.SELECTS, Role.SCORES, at_least=1)
    batch_size: int = knob(
        16, "Samples per device in a forward pass of selection; halved if memory runs out.", at_least=1, at_most=10**5
    )
    seed: int = knob(0, "Seed of the draw of samples, and of the heads of hera_select: random.", Role.SELECTS)
    dtype: StoredDtype = knob(
        "fp32", "Precision in which head outputs are stored for scoring: fp32 or fp16.", fact="stored_dtype"
    )
    memory_gb: float = knob(
        4.0, "Bound on the working memory of scoring, in GiB.", above=0, at_most=10**5, hint="for instance 4"
    )

    def check(self) -> None:
        """There must be neighbors to choose among."""
        least = self.k + 2
        if self.samples < least:
            raise ValueError(f"hera_select_samples: {self.samples} is out of range; choose {least} or more.")


@dataclass(frozen=True)
class HeraConfig(KeyedConfig):
    """Keys of a run with HeRA; a field ``x`` is the key ``hera_x``. Defaults are the paper's where it has one.

    Raises:
        ValueError: A value is impossible or does not fit another; names the key, the value and the remedy.
    """

    PREFIX: ClassVar[str] = "hera_"

    heads: str | None = knob(
        None,
        "Attention heads to align: names such as L13H12,L7H6 (layer and head, zero-based), the path of a heads.json, "
        "or auto to select them before training.",
    )
    objective: str = knob(
        "contrastive",
        "What is minimized: HeRA's loss over neighbors (contrastive), visual tokens against the teacher's patches "
        "(feature, viral; at masked places jarvis) or an autoencoder's latents (ross), averages over text against its "
        "features (feature_pooled), 1 - CKA over the batch (cka), or a class of your own as "
        "my_package.my_module:MyObjective.",
        Role.FIXED,
    )
    granularity: Granularity = knob(
        "head", "Align attention heads (head, hera_heads) or decoder layers (layer, hera_layers).", Role.FIXED
    )
    layers: str | None = knob(
        None,
        "Decoder layers to align under hera_granularity layer: names such as L14,L15 (zero-based), the path of a "
        "layers.json, middle, penultimate, final (behind the last norm), or auto to select them before training.",
    )
    weight: float = knob(
        0.01,
        "Weight (lambda) of the alignment loss beside the language-modeling loss.",
        Role.RESUMABLE,
        at_least=0,
        at_most=1000,
        hint="the paper uses 0.01",
    )
    k: int = knob(
        10, "Nearest neighbors in the teacher's space per sample.", Role.RESUMABLE, at_least=1, at_most=10**6
    )
    temperature: float = knob(
        0.07,
        "Initial softmax temperature of the contrastive loss, learned in log scale.",
        above=0.0001,
        at_most=100,
        hint="the paper uses 0.07",
    )
    fixed_temperature: bool = knob(
        False, "Keep the temperature at its initial value instead of learning it.", Role.FIXED
    )
    projector: Literal["shared", "separate"] = knob(
        "shared",
        "Of feature and viral: three linear layers with SiLU, one projector for all (shared), or two with GELU for "
        "each head or layer (separate).",
        Role.FIXED,
    )
    visual_attention: Literal["causal", "two_way"] = knob(
        "causal",
        "Of jarvis: visual tokens see those before them (causal), or, as its authors have it, one another in both "
        "directions (two_way); no other program runs a model trained this way.",
        Role.FIXED,
    )
    own_learning_rate: float | None = knob(
        None,
        "Peak learning rate of what the objective trains beside the model; by default the run's.",
        Role.RESUMABLE,
        above=0,
        at_most=10,
    )
    own_from: str | None = knob(None, "Output folder of an earlier run, where what the objective trains starts from.")
    teacher: str = knob(
        "facebook/dinov2-large",
        "Frozen vision teacher, or for ross an autoencoder: a local folder or the id of a hub model.",
        *_READING,
        Role.TRAINS,
        fact="teacher_fingerprint",
    )
    teacher_cache: str | None = knob(
        None, "Folder that keeps teacher features by image content; filled while training."
    )
    pooling: Pooling = knob(
        "answer",
        "Tokens that a head's output is averaged over: those with a label (answer), all text (text), all but padding "
        "(mean), or the last one (last).",
        *_READING,
    )
    similarity: Literal["cosine", "dot"] = knob(
        "cosine", "Similarity of representations: cosine, or the plain dot product (dot).", *_READING
    )
    memory: int = knob(
        0,
        "Recent samples kept as further candidates, for global batches below twice hera_k; 0 for none.",
        Role.RESUMABLE,
        at_least=0,
        at_most=10**6,
    )
    accumulate: Literal["none", "gradcache"] = knob(
        "none",
        "Candidates under gradient accumulation: those of the micro-batch (none), or of all micro-batches of the step "
        "at the price of one more forward pass (gradcache).",
        Role.RESUMABLE,
    )
    batches: Literal["random", "neighbors"] = knob(
        "random",
        "Which samples share a batch: any (random), or groups of nearest neighbors in the teacher's space "
        "(neighbors), found in hera_teacher_cache, which is filled before the first step.",
        Role.RESUMABLE,
    )
    image_index: int = knob(
        0, "Which image of a sample with several the teacher sees; negative counts from the last.", Role.RESUMABLE
    )
    max_nan: int = knob(
        10, "Steps in a row with a non-finite HeRA term after which the run stops, at its next log line.", at_least=1
    )
    eval: Literal["none", "demo", "paper", "hallucination"] = knob(
        "none",
        "Suite of benchmarks to evaluate the finished run on, as `llamafactory-hera eval` does, with data in "
        "dataset_dir; results go to output_dir/hera/eval and into the model card.",
    )
    heads_force: bool = knob(
        False, "Train with a heads.json that was selected on another model or teacher, or with another m."
    )
    select: SelectConfig = field(default_factory=SelectConfig)

    @property
    def targets_key(self) -> str:
        """The key that names what is aligned."""
        return "hera_layers" if self.granularity == "layer" else "hera_heads"

    @property
    def named_targets(self) -> str:
        """The value of that key: names, a path, ``auto``, or a layer by its place."""
        return (self.layers if self.granularity == "layer" else self.heads) or ""

    @property
    def normalize(self) -> bool:
        """Cosine similarity when true, dot product otherwise."""
        return self.similarity == "cosine"

    def check(self) -> None:
        """Checks the values with one another."""
        if not self.teacher:
            remedy = "write a folder or a hub id, for instance facebook/dinov2-large"
            raise ValueError(f"hera_teacher: it has no value; {remedy}.")
        self._check_targets()
        self._check_objective()

    def _check_targets(self) -> None:
        other, value = ("hera_heads", self.heads) if self.granularity == "layer" else ("hera_layers", self.layers)
        if value:
            raise ValueError(
                f"{other}: {value} is for hera_granularity: {'head' if other == 'hera_heads' else 'layer'}; set that, "
                f"or remove {other} ({other}=null on a command line)."
            )
        named = self.named_targets
        auto = named == AUTO
        if self.granularity == "layer":
            if auto and self.select.strategy == "middle":
                raise ValueError("hera_select: middle chooses among heads; write hera_layers: middle for that layer.")
            if not auto and named not in NAMED_LAYERS:
                Targets.resolve(named, "layer")
            return
        chosen = self.select.m if auto else len(Targets.resolve(named).items)
        if chosen > _MOST_HEADS:
            key = "hera_select_m" if auto else "hera_heads"
            advice = f"more than the {_MOST_HEADS} that the paper recommends; ten of them wrecked Qwen2.5-3B there"
            warnings.warn(f"{key}: {chosen} heads are {advice}.", stacklevel=5)

    def _check_objective(self) -> None:
        from .objectives import find  # with torch, which a command that reads scores can do without

        objective, named = find(self.objective), f"hera_objective: {self.objective}"
        if self.granularity not in objective.granularities:
            raise ValueError(
                f"hera_granularity: {self.granularity} does not work with {named}; write hera_granularity: "
                f"{' or '.join(objective.granularities)}."
            )
        if self.memory > 0 and not objective.uses_candidates:
            raise ValueError(
                f"hera_memory: {self.memory} has no use with {named}, which compares no sample with remembered ones; "
                "set it to 0."
            )
        if self.visual_attention == "two_way" and not objective.plans_attention:
            raise ValueError(
                f"hera_visual_attention: two_way has no use with {named}, which leaves the attention as it is; set it "
                "to causal."
            )
        if self.batches == "neighbors" and not objective.uses_candidates:
            raise ValueError(
                f"hera_batches: neighbors has no use with {named}, which asks for no neighbors; set it to random."
            )
        if self.batches == "neighbors" and not self.teacher_cache:
            raise ValueError(
                "hera_batches: neighbors finds them in hera_teacher_cache, which is not set; name a folder there, or "
                "set hera_batches: random."
            )
        tokens = objective.view != "pooled"
        if (objective.least_samples == 1 or tokens) and self.accumulate == "gradcache":
            raise ValueError(
                f"hera_accumulate: gradcache has no use with {named}, a mean over samples, none of which is compared "
                "with another; set it to none."
            )
        if objective.view == "latents" and self.named_targets == AUTO:
            raise ValueError(
                f"{self.targets_key}: auto scores against a vision model, and hera_teacher is an autoencoder with "
                f"{named}; write hera_layers: final."
            )
        if objective.view == "latents" and self.teacher_cache is not None:
            raise ValueError(
                f"hera_teacher_cache: {self.teacher_cache} holds what does not change, and {named} draws a sample of "
                "the autoencoder's posterior in every step; remove it."
            )
