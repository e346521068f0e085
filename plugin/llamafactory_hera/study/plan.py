"""The units of work of a study, and what each needs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import layout, recipes, work
from .layout import Run, Seed, final_run, tuning_run
from .methods import METHODS, TUNED, ranked_heads
from .pool import Unit, command_line
from .settings import Settings
from .tuning import choose_weight, chosen_weight
from .world import StudySplit

_SHARED = ("teacher_cache", "tokenized/stage1")


def plan(root: Path, settings: Settings) -> list[Unit]:
    """Every unit of a study, each behind those it needs.

    Args:
        root: The study's folder.
        settings: What is to be done.
    """
    units = _shared(root, settings)
    for seed in settings.all_seeds:
        units += _seed(root, settings, Seed(seed))
    tuning = []
    for weight in settings.weights:
        run = tuning_run(TUNED, weight, settings.tuning_seed)
        tuning += _run(root, settings, run, TUNED, settings.tuning_seed, "validation", lambda weight=weight: weight)
    after = tuple(unit.name for unit in tuning)
    choice = Unit("tuning/choice", "choice", (), (), after, partial(choose_weight, root, settings))
    units += [*tuning, choice]
    for seed in settings.seeds:  # all methods of a seed before the next: a stopped study is whole as far as it got
        for method in settings.methods:
            run = final_run(method, seed)
            units += _run(root, settings, run, method, seed, "test", partial(chosen_weight, root))
    return units


def _shared(root: Path, settings: Settings) -> list[Unit]:
    def cache_recipes() -> None:
        for split in ("train", "validation", "test"):
            recipe = recipes.scoring(settings, Seed(settings.tuning_seed).llava, split, "parts")
            recipes.write(root / f"parts/cache_{split}.yaml", recipe)

    listed = [f"parts/cache_{split}.yaml" for split in ("train", "validation", "test")]
    llava = f"{Seed(settings.tuning_seed).folder}/llava"
    units = [
        Unit("parts", "parts", (work.command(work.parts),), (layout.DATA, layout.TOKENIZER)),
        Unit("tower", "tower", (work.command(work.tower),), (layout.TOWER,), ("parts",)),
        Unit(
            "teacher",
            "teacher",
            (work.command(work.teacher),),
            (layout.TEACHER, layout.CONTROL),
            ("parts",),
        ),
        Unit(
            "teacher_cache",
            "teacher_cache",
            (work.command(work.teacher_cache, *listed),),
            (layout.TEACHER_CACHE,),
            ("teacher", llava),
            cache_recipes,
        ),
    ]
    for name, split in (("stage1", None), ("stage2_validation", "validation"), ("stage2_test", "test")):
        units.append(_tokenize(root, settings, name, split, llava))
    return units


def _tokenize(root: Path, settings: Settings, name: str, split: StudySplit | None, llava: str) -> Unit:
    """The host tokenises a dataset once and every run reads it: a run of one step, thrown away."""
    recipe = f"tokenized/{name}.yaml"
    output = f"tokenized/{name}_run"

    def prepare() -> None:
        seed, model = settings.tuning_seed, Seed(settings.tuning_seed).llava
        if split is None:
            content = recipes.stage1(settings, seed, output, None)
        else:
            content = recipes.stage2(settings, seed, model, output, None, split) | {"do_predict": False}
        recipes.write(root / recipe, content | {"max_steps": 1, "per_device_train_batch_size": 1})

    folder = layout.tokenized(name)
    train = command_line("llamafactory-cli", "train", recipe)
    return Unit(f"tokenized/{name}", "tokenized", (train,), (folder, output), (llava,), prepare)


def _seed(root: Path, settings: Settings, seed: Seed) -> list[Unit]:
    pretrain, select = f"{seed.folder}/pretrain.yaml", f"{seed.folder}/select.yaml"
    split: StudySplit = "test" if seed.number in settings.seeds else "validation"
    score = f"{seed.folder}/score_{split}.yaml"

    def write_pretraining() -> None:
        recipes.write(root / pretrain, recipes.pretraining(settings, seed))

    def write_scoring() -> None:
        recipes.write(root / select, recipes.scoring(settings, seed.llava, "train", seed.selection))
        recipes.write(root / score, recipes.scoring(settings, seed.llava, split, f"{seed.folder}/scores"))

    targets = [f"{mode}={seed.scores(split, mode)}" for mode in layout.MODES]
    number = str(seed.number)
    return [
        Unit(
            f"{seed.folder}/language_model",
            "language_model",
            (command_line("llamafactory-cli", "train", pretrain),),
            (seed.language_model,),
            ("parts",),
            write_pretraining,
        ),
        Unit(
            f"{seed.folder}/llava",
            "llava",
            (work.command(work.llava, number),),
            (seed.llava,),
            (f"{seed.folder}/language_model", "tower"),
        ),
        Unit(
            f"{seed.folder}/selection",
            "selection",
            (work.command(work.select, select, score, *targets),),
            (seed.selection, f"{seed.folder}/scores"),
            (f"{seed.folder}/llava", "teacher_cache"),
            write_scoring,
        ),
    ]


def _run(
    root: Path,
    settings: Settings,
    run: Run,
    name: str,
    seed: int,
    split: StudySplit,
    weight: Callable[[], float],
) -> list[Unit]:
    method, made = METHODS[name], Seed(seed)
    tokenized = f"tokenized/stage2_{split}"

    def keys(stage: int) -> dict[str, Any] | None:
        if method.plain or stage not in method.stages:
            return None
        return method.hera_keys(weight, partial(ranked_heads, root / made.heads, seed))

    def write_stage1() -> None:
        recipes.write(root / run.recipe("stage1"), recipes.stage1(settings, seed, run.stage(1), keys(1)))

    def write_stage2() -> None:
        content = recipes.stage2(settings, seed, run.stage(1), run.stage(2), keys(2), split)
        recipes.write(root / run.recipe("stage2"), content)

    def write_scoring() -> None:
        recipes.write(root / run.recipe("score"), recipes.scoring(settings, run.stage(2), split, run.path))

    needed = (*_SHARED, tokenized, f"{made.folder}/selection")
    if run.folder == "runs" and method.weight == "chosen":
        needed += ("tuning/choice",)
    targets = [f"{mode}={run.scores(mode)}" for mode in layout.MODES]
    stage1, stage2 = (command_line("llamafactory-cli", "train", run.recipe(f"stage{n}")) for n in (1, 2))
    return [
        Unit(f"{run.path}/stage1", "stage1", (stage1,), (run.stage(1),), needed, write_stage1),
        Unit(f"{run.path}/stage2", "stage2", (stage2,), (run.stage(2),), (f"{run.path}/stage1",), write_stage2),
        Unit(
            f"{run.path}/score",
            "score",
            (work.command(work.score, run.recipe("score"), *targets),),
            tuple(run.scores(mode) for mode in layout.MODES),
            (f"{run.path}/stage2",),
            write_scoring,
        ),
    ]
