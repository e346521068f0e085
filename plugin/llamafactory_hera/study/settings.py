"""How large a study is: amounts, steps, seeds and methods; one frozen record that names a result."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from .methods import METHODS

#: Raise it when the same settings give another study than before.
GENERATOR = 1


@dataclass(frozen=True)
class Settings:
    """Everything that decides a study's numbers.

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
        methods: Names of ``methods.METHODS``.
    """

    scenes: int
    asked: int
    questions: int
    tower_steps: int
    teacher_steps: int
    language_steps: int
    stage1_steps: int
    stage2_steps: int
    batch_size: int
    stage1_rate: float
    stage2_rate: float
    neighbours: int
    scored: int
    seeds: tuple[int, ...]
    tuning_seed: int
    weights: tuple[float, ...]
    methods: tuple[str, ...]

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
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        values.pop("generator")
        return cls(**values)


_DEFAULT = Settings(
    scenes=4000,
    asked=4,
    questions=200,
    tower_steps=2500,
    teacher_steps=1200,
    language_steps=600,
    stage1_steps=60,
    stage2_steps=700,
    batch_size=64,
    stage1_rate=2e-3,
    stage2_rate=1e-3,
    neighbours=10,
    scored=800,
    seeds=(1, 2, 3),
    tuning_seed=100,
    weights=(0.03, 0.1, 0.3),
    methods=tuple(METHODS),
)

#: Sizes by name. ``smoke`` only takes the way once, with two methods: its numbers say nothing.
SIZES: dict[str, Settings] = {
    "smoke": replace(
        _DEFAULT,
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
    "default": _DEFAULT,
    "full": replace(
        _DEFAULT,
        stage1_steps=2 * _DEFAULT.stage1_steps,
        stage2_steps=2 * _DEFAULT.stage2_steps,
        seeds=tuple(range(1, 9)),
    ),
}
