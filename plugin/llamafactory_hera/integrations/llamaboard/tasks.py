"""What the buttons of the web UI run: the selection of heads, and the comparison of a trained model with before."""

from pathlib import Path
from typing import Any

import yaml
from llamafactory.extras.constants import TRAINING_ARGS
from llamafactory.webui.common import _clean_cmd

from llamafactory_hera.heads.head_set import HeadSet
from llamafactory_hera.selection.run import FOLDER, HEADS_FILE

from .job import Job
from .names import STAGE

SELECT, COMPARE = "select", "compare"
#: The comparison's picture and page, in the run's ``hera`` folder.
REPORT = "report"
_RECIPE = "select.yaml"

# Fact of a selection -> the key with which scores of another model become comparable with it.
_SCORED_WITH = {
    "mode": "hera_select_mode",
    "samples_asked": "hera_select_samples",
    "k": "hera_select_k",
    "seed": "hera_select_seed",
    "stored_dtype": "hera_select_dtype",
    "pooling": "hera_pooling",
    "similarity": "hera_similarity",
}


def heads_file(folder: Path) -> Path:
    """Where a run's selection is written."""
    return folder / FOLDER / HEADS_FILE


def select_job(args: dict[str, Any], lang: str) -> Job:
    """The selection for a run of these arguments; writes its recipe.

    Raises:
        OSError: The output folder cannot be written.
    """
    folder = Path(args["output_dir"])
    recipe = folder / FOLDER / _RECIPE
    recipe.parent.mkdir(parents=True, exist_ok=True)
    content = _clean_cmd({**args, "stage": STAGE})
    recipe.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Job(SELECT, [["select", str(recipe)]], folder, folder / FOLDER / "select.log", lang)


def compare_job(folder: Path, lang: str) -> Job | None:
    """Scores the model that a run has saved, and compares it with the selection before the run.

    Without scores of that selection, as for heads that were written by hand, the model before training is scored, too.

    Returns:
        None if the folder holds no finished run.
    """
    recipe = folder / TRAINING_ARGS
    trained = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    if not (recipe.is_file() and trained):
        return None
    before, after = heads_file(folder), folder / FOLDER / "scores.json"
    commands = []
    provenance = HeadSet.load(before).provenance if before.is_file() else {}
    settings = [f"{key}={provenance[fact]}" for fact, key in _SCORED_WITH.items() if fact in provenance]
    if not provenance.get("scores"):
        before, settings = folder / FOLDER / "before.json", []
        commands.append(["score", str(recipe), "--output", str(before)])
    commands.append(["score", str(folder), "--recipe", str(recipe), "--output", str(after), *settings])
    report = [
        "report",
        str(before),
        str(after),
        "--names",
        "before",
        "after",
        "--output",
        str(folder / FOLDER / REPORT),
    ]
    return Job(COMPARE, [*commands, report], folder, folder / FOLDER / "compare.log", lang)
