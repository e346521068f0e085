"""The choice of the loss weight: on the validation split, with one seed, before any final run."""

from pathlib import Path

from ..files import read_json, write_json
from . import layout
from .dataset import questions_of
from .layout import tuning_run
from .methods import TUNED
from .scoring import accuracy_of
from .settings import Settings


def choose_weight(root: Path, settings: Settings) -> None:
    """Takes the weight with the best mean accuracy over the categories, the smaller one of equals; logs all tried."""
    tried = []
    dataset = questions_of("validation")
    for weight in sorted(settings.weights):
        run = tuning_run(TUNED, weight, settings.tuning_seed)
        found = accuracy_of(root / run.predictions, root / layout.DATA / "key.json", dataset)
        tried.append({"weight": weight, "method": TUNED, "seed": settings.tuning_seed, "accuracy": found})
    best = max(tried, key=lambda entry: (entry["accuracy"]["mean"], -entry["weight"]))
    write_json(root / layout.TUNING, {"chosen": best["weight"], "tried": tried})


def chosen_weight(root: Path) -> float:
    """The weight that was chosen."""
    return read_json(root / layout.TUNING)["chosen"]
