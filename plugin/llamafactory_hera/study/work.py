"""What runs in processes of its own: ``python -m llamafactory_hera.study.work WORK …`` in the study's folder."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from ..files import read_json
from . import layout
from .settings import Settings

ROOT = Path(".")


def parts() -> None:
    """Scenes and what is said of them, tokenizer, and each seed's language model before training."""
    from .dataset import write_study_data
    from .parts import make_language_model, make_tokenizer

    settings = _settings()
    write_study_data(ROOT / layout.DATA, settings)
    make_tokenizer(ROOT / layout.DATA, ROOT / layout.TOKENIZER)
    for number in settings.all_seeds:
        make_language_model(ROOT / layout.TOKENIZER, ROOT / layout.Seed(number).untrained, number)


def tower() -> None:
    """The vision tower."""
    from .parts import make_tower

    make_tower(ROOT / layout.DATA, ROOT / layout.TOWER, _settings())


def teacher() -> None:
    """The teacher, and what its CLS token tells of scenes that it has not seen."""
    from .control import write_control
    from .parts import make_teacher

    make_teacher(ROOT / layout.DATA, ROOT / layout.TEACHER, _settings())
    write_control(ROOT / layout.DATA, ROOT / layout.TEACHER, ROOT / layout.CONTROL)


def teacher_cache(*recipes: str) -> None:
    """The teacher's features of all images that runs read."""
    from ..selection.api import fill_teacher

    for recipe in recipes:
        fill_teacher(recipe)


def llava(seed: str) -> None:
    """A seed's LLaVA before any multimodal training."""
    from .parts import make_llava

    made = layout.Seed(int(seed))
    make_llava(ROOT / made.language_model, ROOT / layout.TOWER, ROOT / made.llava, made.number)


def select(recipe: str, *scoring: str) -> None:
    """The scores that heads are taken by, on the language model alone; then those on held-out captions."""
    from ..selection import api

    api.select(recipe, ["hera_select_mode=llm"])
    score(*scoring)


def score(recipe: str, *targets: str) -> None:
    """Scores of all heads, ``MODE=FILE`` each."""
    from ..selection.api import score_checkpoint

    for target in targets:
        mode, file = target.split("=", 1)
        score_checkpoint(None, recipe, file, [f"hera_select_mode={mode}"])


WORKS: tuple[Callable[..., None], ...] = (
    parts,
    tower,
    teacher,
    teacher_cache,
    llava,
    select,
    score,
)


def command(work: Callable[..., None], *arguments: str) -> tuple[str, ...]:
    """The command that does it."""
    return (sys.executable, "-m", "llamafactory_hera.study.work", work.__name__, *arguments)


def _settings() -> Settings:
    return Settings.from_dict(read_json(ROOT / layout.SETTINGS)["settings"])


if __name__ == "__main__":
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARNING")
    name, *given = sys.argv[1:]
    {work.__name__: work for work in WORKS}[name](*given)
