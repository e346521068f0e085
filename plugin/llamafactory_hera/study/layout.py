"""Where a study keeps what; every path is relative to its folder, in which all its processes are started."""

from dataclasses import dataclass

SETTINGS = "study.json"
DATA = "data"
TOKENIZER = "parts/tokenizer"
TOWER = "parts/tower"
TEACHER = "parts/teacher"
TEACHER_CACHE = "parts/teacher_cache"
CONTROL = "parts/teacher_control.json"
TUNING = "tuning/tuning.json"
MODES = ("llm", "mllm")


def tokenized(stage: str) -> str:
    """The host's tokenised dataset of ``stage1``, or of stage 2 together with a split: ``stage2_test``."""
    return f"tokenized/{stage}"


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
    """One training run of a method.

    Attributes:
        name: Method and seed; tuning runs say their weight, too.
        folder: ``runs`` or ``tuning``.
    """

    name: str
    folder: str

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"

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
    return Run(f"{method}-s{seed}", "runs")


def tuning_run(method: str, weight: float, seed: int) -> Run:
    """A run that chooses a weight on the validation split."""
    return Run(f"{method}-w{weight:g}-s{seed}", "tuning")
