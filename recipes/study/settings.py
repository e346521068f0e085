"""What a study is: its methods, how large it is, and where it keeps what."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llamafactory_hera.config import Strategy

#: Raise it when the same settings give another study than before.
GENERATOR = 1
PAPER_WEIGHT = 0.01


@dataclass(frozen=True)
class Method:
    """One way to train: a row of keys for the host.

    Attributes:
        label: Its name in tables.
        heads: The strategy by which heads are selected and how many; None where the method has no heads.
        weight: The weight of the loss: the paper's, the one chosen on the validation split, or the method's own
            (among ``keys``).
        keys: Further ``hera_*`` keys; None for plain fine-tuning.
        stages: Stages that use the method; the others are plain.
    """

    label: str
    heads: tuple[Strategy, int] | None = None
    weight: Literal["paper", "chosen", "own"] = "chosen"
    keys: dict[str, Any] | None = field(default_factory=dict)
    stages: tuple[int, ...] = (1, 2)

    def hera_keys(
        self, stage: int, weight: Callable[[], float], select: Callable[[Strategy, int], Sequence[str]]
    ) -> dict[str, Any] | None:
        """The ``hera_*`` keys of a stage; None for plain fine-tuning.

        Args:
            stage: 1 or 2.
            weight: Gives the weight that was chosen on the validation split; asked only by methods that take it.
            select: From a strategy and a number to the names of heads.
        """
        if self.keys is None or stage not in self.stages:
            return None
        found: dict[str, Any] = dict(self.keys)
        if self.weight != "own":
            found["hera_weight"] = PAPER_WEIGHT if self.weight == "paper" else weight()
        if self.heads is not None:
            found["hera_heads"] = ",".join(select(*self.heads))
        return found


_MIDDLE = {"hera_granularity": "layer", "hera_layers": "middle"}
_VIRAL = {
    "hera_objective": "viral",
    **_MIDDLE,
    "hera_weight": 0.5,
    "hera_teacher_cache": None,  # it keeps one vector an image, and VIRAL needs those of the patches
}
METHODS: dict[str, Method] = {
    "sft": Method("SFT", weight="own", keys=None),
    "worst5_paper": Method("HeRA worst-5, paper's weight", ("worst", 5), "paper"),
    "worst5": Method("HeRA worst-5", ("worst", 5)),
    "top5": Method("HeRA top-5", ("top", 5)),
    "random5": Method("HeRA random-5", ("random", 5)),
    "worst1": Method("HeRA worst-1", ("worst", 1)),
    "worst10": Method("HeRA worst-10", ("worst", 10)),
    "layer": Method("contrastive, middle layer", keys=_MIDDLE),
    "viral": Method("VIRAL", weight="own", keys=_VIRAL, stages=(2,)),
    "cmar": Method("CMAR", keys={"hera_objective": "cka", "hera_granularity": "layer", "hera_layers": "penultimate"}),
}
#: What the others are compared with.
BASELINE = "sft"
#: The method whose weight is chosen on the validation split.
TUNED = "worst5"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a study's numbers; the defaults are the study of the name ``default``.

    Attributes:
        scenes: Training scenes.
        asked: Questions about a training scene, each a sample of its own.
        questions: Questions of each category in validation and in test; every two need a scene.
        tower_steps: Updates of the vision tower, by masked autoencoding of training images.
        teacher_steps: Updates of the teacher, by contrast of training images.
        language_steps: Updates of the language model on text alone, 16 blocks of 256 tokens each.
        stage1_steps: Updates of the projector alone, on captions.
        stage2_steps: Updates of projector and language model, on questions.
        batch_size: Samples a step, in one micro-batch.
        stage1_rate: Highest learning rate of stage 1.
        stage2_rate: Highest learning rate of stage 2.
        neighbours: ``hera_k`` of training.
        scored: Captions that heads are selected and scored on, at most.
        seeds: One run of every method each.
        tuning_seed: The seed of the runs that choose settings on the validation split; none of ``seeds`` but in a
            smoke test.
        weights: Loss weights that are tried in them.
        methods: Names of ``METHODS``.
    """

    scenes: int = 4000
    asked: int = 4
    questions: int = 200
    tower_steps: int = 2500
    teacher_steps: int = 1200
    language_steps: int = 600
    stage1_steps: int = 60
    stage2_steps: int = 700
    batch_size: int = 64
    stage1_rate: float = 2e-3
    stage2_rate: float = 1e-3
    neighbours: int = 10
    scored: int = 800
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seed: int = 100
    weights: tuple[float, ...] = (0.03, 0.1, 0.3)
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The tuning seed, then those of the final runs."""
        return tuple(dict.fromkeys((self.tuning_seed, *self.seeds)))

    def to_dict(self) -> dict[str, Any]:
        """As it is written beside the results."""
        return {"generator": GENERATOR} | {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Settings":
        """The inverse of :meth:`to_dict`."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        values.pop("generator")
        return cls(**values)


#: Sizes by name. ``smoke`` only takes the way once, with two methods: its numbers say nothing.
SIZES: dict[str, Settings] = {
    "smoke": Settings(
        scenes=128,
        asked=2,
        questions=6,
        tower_steps=10,
        teacher_steps=10,
        language_steps=4,
        stage1_steps=2,
        stage2_steps=3,
        batch_size=16,
        neighbours=5,
        scored=24,
        seeds=(0,),
        tuning_seed=0,
        weights=(0.1,),
        methods=("sft", "worst5"),
    ),
    "default": Settings(),
    "full": replace(Settings(), stage1_steps=120, stage2_steps=1400, seeds=tuple(range(1, 9))),
}

# Paths are relative to the study's folder, in which all its processes are started.
STUDY = "study.json"
DATA = "data"
KEY = f"{DATA}/key.json"
TOKENIZER = "parts/tokenizer"
TOWER = "parts/tower"
TEACHER = "parts/teacher"
TEACHER_CACHE = "parts/teacher_cache"
CONTROL = "parts/teacher_control.json"
TUNING = "tuning/tuning.json"
MODES = ("llm", "mllm")


@dataclass(frozen=True)
class Seed:
    """What the runs of one seed share."""

    number: int

    @property
    def folder(self) -> str:
        return f"seeds/s{self.number}"

    @property
    def untrained(self) -> str:
        """The language model with random weights."""
        return f"{self.folder}/untrained"

    @property
    def language_model(self) -> str:
        """The same after its pre-training."""
        return f"{self.folder}/language_model"

    @property
    def llava(self) -> str:
        """Language model and tower put together; every run starts here."""
        return f"{self.folder}/llava"

    @property
    def selection(self) -> str:
        """``output_dir`` of the head selection."""
        return f"{self.folder}/selection"

    @property
    def heads(self) -> str:
        """All heads' scores on training captions, from which heads are taken."""
        return f"{self.selection}/hera/heads.json"

    def scores(self, split: str, mode: str) -> str:
        """Scores of all heads of the untrained LLaVA on held-out captions."""
        return f"{self.folder}/scores/{split}_{mode}.json"


@dataclass(frozen=True)
class Run:
    """One training run of a method: one that the report counts, or one that chooses a weight."""

    path: str

    def stage(self, number: int) -> str:
        """``output_dir`` of a stage."""
        return f"{self.path}/stage{number}"

    def recipe(self, name: str) -> str:
        return f"{self.path}/{name}.yaml"

    def scores(self, mode: str) -> str:
        """Scores of all heads after stage 2."""
        return f"{self.path}/scores_{mode}.json"

    @property
    def predictions(self) -> str:
        """What the host wrote for the held-out questions."""
        return f"{self.stage(2)}/generated_predictions.jsonl"


def final_run(method: str, seed: int) -> Run:
    """A run that the report counts."""
    return Run(f"runs/{method}-s{seed}")


def tuning_run(weight: float, seed: int) -> Run:
    """A run that chooses a weight on the validation split."""
    return Run(f"tuning/{TUNED}-w{weight:g}-s{seed}")
