"""What a study is: its methods and how large it is."""

from dataclasses import asdict, dataclass, field
from typing import Any

from llamafactory_hera.config import Strategy

#: Raise it when the same settings give another study than before.
GENERATOR = 2


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        label: Its name in tables.
        heads: The strategy by which five heads are selected; None where the method has no heads.
        weight: The loss's; None where it is the one chosen on the validation questions.
        keys: Further fields of ``HeraConfig``; None for plain fine-tuning.
        stages: Stages that use the method; the others are plain.
        batch_size: Samples a step, where not the study's; as many steps as see as many samples.
    """

    label: str
    heads: Strategy | None = None
    weight: float | None = None
    keys: dict[str, Any] | None = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2)
    batch_size: int | None = None


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
#: ``hera_batches`` at three sizes, with no candidates but the batch: the methods of the size ``batches`` alone.
BATCHES: dict[str, Method] = {
    f"{kind}_{size}": Method(f"{kind}, batch {size}", "worst", keys={"memory": 0, "batches": kind}, batch_size=size)
    for size in (16, 64, 128)
    for kind in ("random", "neighbors")
}
#: What the others are compared with.
BASELINE = "sft"
#: The rows of the question that the study asks, with all seeds; the others have the first ones.
PRIMARY = ("sft", "worst5_paper", "worst5", "top5", "random5")
#: The method whose weight is chosen on the validation questions.
TUNED = "worst5"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a study's numbers; the defaults are the study of the name ``default``.

    Attributes:
        scenes: Training scenes.
        asked: Questions about a training scene, each a sample of its own.
        questions: Questions of each category in each set that is not trained on.
        scored: Captions that heads are selected on, and as many others that they are scored on.
        teacher_steps: Updates of the teacher, by contrast of training images.
        language_steps: Updates of the language model on text alone, 16 documents each.
        stage1_steps: Updates of the projector alone, on captions.
        stage2_steps: Updates of projector and language model, on questions.
        batch_size: Samples a step, in one micro-batch.
        memory: ``hera_memory``.
        neighbors: ``hera_k`` of training.
        stage1_rate: Highest learning rate of stage 1.
        stage2_rate: Highest learning rate of stage 2.
        seeds: One run of each primary method.
        secondary_seeds: How many of them, from the first on, the other methods have.
        tuning_seed: The seed of the runs that choose the weight; none of ``seeds`` but in a smoke test.
        weights: Loss weights that are tried in them.
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
        """Method and seed of all runs: the primary methods' first, and all those of a seed before the next."""
        few = self.seeds[: self.secondary_seeds]
        found = [(m, seed) for seed in self.seeds for m in self.methods if m in PRIMARY or seed in few]
        return sorted(found, key=lambda run: run[0] not in PRIMARY)

    def to_dict(self) -> dict[str, Any]:
        """As it is written beside the results."""
        return {"generator": GENERATOR} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


#: Sizes by name. ``smoke`` only takes the way once, with two methods: its numbers say nothing.
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
    # with the weight that was chosen in the default one
    "batches": Settings(methods=(BASELINE, TUNED, *BATCHES), weights=(0.1,), secondary_seeds=40),
}
METHODS |= BATCHES  # not among the default's
