"""The methods that a study compares, and the sizes of a study."""

from dataclasses import asdict, dataclass, field
from typing import Any

from llamafactory_hera.config import Strategy


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: The name of the method in tables.
        heads: The strategy that selects its five heads; None if the method aligns no heads.
        weight: The weight of its loss; None for the weight chosen on the validation questions.
        keys: More fields of ``HeraConfig``; None for plain fine-tuning.
        stages: The stages that use the method; the other stages are plain fine-tuning.
    """

    label: str
    heads: Strategy | None = None
    weight: float | None = None
    keys: dict[str, Any] | None = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2)


def _layer(name: str, objective: str = "contrastive") -> dict[str, Any]:
    return {"objective": objective, "granularity": "layer", "layers": name}


METHODS: dict[str, Method] = {
    "sft": Method("SFT", keys=None),
    "worst5_paper": Method("HeRA worst-5, paper's weight", "worst", 0.01),
    "worst5": Method("HeRA worst-5", "worst"),
    "top5": Method("HeRA top-5", "top"),
    "random5": Method("HeRA random-5", "random"),
    "layer": Method("contrastive, middle layer", keys=_layer("middle")),
    "cmar": Method("CMAR", weight=0.1, keys=_layer("penultimate", "cka")),
    "feature_layer": Method("features, middle layer", keys=_layer("middle", "feature")),
    "feature_heads": Method("features, worst-5", "worst", keys={"objective": "feature"}),
    "viral": Method("VIRAL", weight=0.5, keys=_layer("middle", "viral"), stages=(2,)),
    "jarvis": Method("JARVIS", weight=1.0, keys=_layer("middle", "jarvis"), stages=(1,)),
}
#: The method with which all others are compared.
BASELINE = "sft"
#: The methods that the study is about. They run with all seeds, the other methods only with the first few.
PRIMARY = ("sft", "worst5_paper", "worst5", "top5", "random5")
#: The method whose weight is chosen on the validation questions.
TUNED = "worst5"


@dataclass(frozen=True)
class Settings:
    """The settings that determine a study's numbers; the default values form the ``default`` size.

    Attributes:
        scenes: The number of training scenes.
        asked: The number of questions per training scene; each question is a separate sample.
        questions: The number of questions per category in each validation and test set.
        scored: The number of captions on which heads are selected; MKNN is measured on as many others.
        teacher_steps: The number of updates of the teacher, by contrastive learning on training images.
        language_steps: The number of updates of the language model, on text alone, with 16 documents each.
        stage1_steps: The number of updates of the projector, on captions.
        stage2_steps: The number of updates of the projector and the language model, on questions.
        batch_size: The number of samples per step, in one micro-batch.
        memory: The value of ``hera_memory``.
        neighbors: The value of ``hera_k`` in training.
        stage1_rate: Peak learning rate of stage 1.
        stage2_rate: Peak learning rate of stage 2.
        seeds: The seeds of the primary methods.
        secondary_seeds: The other methods run only with this number of ``seeds``, starting with the first.
        tuning_seed: The seed of the runs that choose the weight; ``seeds`` contains it only in the smoke test.
        weights: The weights that the tuning runs try.
        methods: Names of ``METHODS``.
    """

    scenes: int = 16000
    asked: int = 2
    questions: int = 500
    scored: int = 2000
    teacher_steps: int = 800
    language_steps: int = 1500
    stage1_steps: int = 60
    stage2_steps: int = 1500
    batch_size: int = 48
    memory: int = 128
    neighbors: int = 10
    stage1_rate: float = 2e-3
    stage2_rate: float = 3e-3
    seeds: tuple[int, ...] = tuple(range(1, 11))
    secondary_seeds: int = 4
    tuning_seed: int = 100
    weights: tuple[float, ...] = (0.03, 0.1, 0.3)
    methods: tuple[str, ...] = tuple(METHODS)

    def runs(self) -> list[tuple[str, int]]:
        """Lists every run's method and seed: primary methods first, and all runs of a seed before the next seed."""
        few = self.seeds[: self.secondary_seeds]
        found = [(m, seed) for seed in self.seeds for m in self.methods if m in PRIMARY or seed in few]
        return sorted(found, key=lambda run: run[0] not in PRIMARY)

    def to_dict(self) -> dict[str, Any]:
        """Converts the settings to the values that are stored with the results."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


#: The sizes by name. ``smoke`` only tests that each part of a study runs; its numbers mean nothing.
SIZES: dict[str, Settings] = {
    "smoke": Settings(
        scenes=128,
        questions=6,
        scored=24,
        teacher_steps=10,
        language_steps=4,
        stage1_steps=2,
        stage2_steps=3,
        batch_size=16,
        memory=32,
        neighbors=5,
        seeds=(1,),
        tuning_seed=1,
        weights=(0.1,),
        methods=("sft", "worst5"),
    ),
    "default": Settings(),
}
