"""The units of work of a study, what each needs, and the recipes that it gives to the host."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llamafactory_hera.config import Strategy
from llamafactory_hera.files import read_json, write_json, write_text
from llamafactory_hera.selection.scores import ScoreFile, choose_targets
from pool import Unit
from results import accuracy_of
from settings import (
    CONTROL,
    DATA,
    KEY,
    METHODS,
    MODES,
    TEACHER,
    TEACHER_CACHE,
    TOKENIZER,
    TOWER,
    TUNED,
    TUNING,
    Run,
    Seed,
    Settings,
    final_run,
    tuning_run,
)
from world import CAPTIONS, TEXT, TRAIN, StudySplit, captions_of, questions_of

_HOST = {
    "do_train": True,
    "finetuning_type": "full",
    "disable_gradient_checkpointing": True,
    "dataset_dir": DATA,
    "cutoff_len": 256,
    "overwrite_output_dir": True,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "bf16": False,
    "use_cpu": True,
    "dataloader_num_workers": 0,
}
_MULTIMODAL = _HOST | {"freeze_vision_tower": True, "freeze_multi_modal_projector": False}
_HERA = {"hera_teacher": TEACHER, "hera_teacher_cache": TEACHER_CACHE}
_SPLITS: tuple[StudySplit, ...] = ("train", "validation", "test")


def pretraining(settings: Settings, seed: Seed) -> dict[str, Any]:
    """The language model on text alone."""
    return _HOST | {
        "model_name_or_path": seed.untrained,
        "stage": "pt",
        "dataset": TEXT,
        "template": "empty",
        "output_dir": seed.language_model,
        "per_device_train_batch_size": 16,
        "learning_rate": 4.0e-3,
        "max_steps": settings.language_steps,
        "seed": seed.number,
    }


def stage1(settings: Settings, seed: int, output: str, hera: dict[str, Any] | None) -> dict[str, Any]:
    """LLaVA's stage 1: the projector alone, on captions."""
    recipe = _MULTIMODAL | {
        "model_name_or_path": Seed(seed).llava,
        "freeze_language_model": True,
        "dataset": CAPTIONS,
        "template": "llava_plain",
        "tokenized_path": "tokenized/stage1",
        "output_dir": output,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.stage1_rate,
        "max_steps": settings.stage1_steps,
        "seed": seed,
    }
    return recipe | _method(settings, hera)


def stage2(
    settings: Settings, seed: int, model: str, output: str, hera: dict[str, Any] | None, split: StudySplit
) -> dict[str, Any]:
    """LLaVA's stage 2: projector and language model on questions, then answers to a split's questions."""
    recipe = _MULTIMODAL | {
        "model_name_or_path": model,
        "freeze_language_model": False,
        "do_predict": True,
        "predict_with_generate": True,
        "do_sample": False,
        "max_new_tokens": 12,
        "per_device_eval_batch_size": 100,
        "dataset": TRAIN,
        "eval_dataset": questions_of(split),
        "template": "llava_qwen3",
        "tokenized_path": f"tokenized/stage2_{split}",
        "output_dir": output,
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.stage2_rate,
        "max_steps": settings.stage2_steps,
        "seed": seed,
    }
    return recipe | _method(settings, hera)


def _method(settings: Settings, hera: dict[str, Any] | None) -> dict[str, Any]:
    if hera is None:
        return {"stage": "sft"}
    return {"stage": "hera", "hera_k": settings.neighbours} | _HERA | hera


def scoring(settings: Settings, model: str, split: StudySplit, output: str) -> dict[str, Any]:
    """What head scores need to know: model, teacher and captions."""
    return (
        _HOST
        | _HERA
        | {
            "model_name_or_path": model,
            "stage": "hera",
            "hera_heads": "auto",
            "hera_select_samples": settings.scored,
            "hera_select_batch_size": 64,
            "dataset": captions_of(split),
            "template": "llava_plain",
            "output_dir": output,
        }
    )


def plan(root: Path, settings: Settings) -> list[Unit]:
    """Every unit of a study, each behind those it needs.

    Args:
        root: The study's folder.
        settings: What is to be done.
    """
    units = _shared(root, settings)
    for number in settings.all_seeds:
        units += _seed(root, settings, Seed(number))
    tuning: list[Unit] = []
    for weight in settings.weights:
        run = tuning_run(weight, settings.tuning_seed)
        tuning += _run(root, settings, run, TUNED, settings.tuning_seed, "validation", partial(float, weight))
    after = tuple(unit.name for unit in tuning)
    choice = Unit("tuning/choice", "choice", (), (), after, partial(choose_weight, root, settings))
    units += [*tuning, choice]
    for seed in settings.seeds:  # all methods of a seed before the next: a stopped study is whole as far as it got
        for method in settings.methods:
            run = final_run(method, seed)
            units += _run(root, settings, run, method, seed, "test", lambda: read_json(root / TUNING)["chosen"])
    return units


def choose_weight(root: Path, settings: Settings) -> None:
    """Takes the weight with the best mean accuracy over the categories, the smaller one of equals; logs all tried."""
    tried: list[dict[str, Any]] = []
    for weight in sorted(settings.weights):
        run = tuning_run(weight, settings.tuning_seed)
        accuracy = accuracy_of(root / run.predictions, root / KEY, questions_of("validation"))
        tried.append({"weight": weight, "method": TUNED, "seed": settings.tuning_seed, "accuracy": accuracy})
    best = max(tried, key=lambda entry: (entry["accuracy"]["mean"], -entry["weight"]))
    write_json(root / TUNING, {"chosen": best["weight"], "tried": tried})


def _shared(root: Path, settings: Settings) -> list[Unit]:
    first = Seed(settings.tuning_seed)
    llava = f"{first.folder}/llava"
    listed = {split: f"parts/cache_{split}.yaml" for split in _SPLITS}

    def cache_recipes() -> None:
        for split, file in listed.items():
            _write(root / file, scoring(settings, first.llava, split, "parts"))

    fill = _work("teacher_cache", *listed.values())
    units = [
        Unit("parts", "parts", (_work("parts"),), (DATA, TOKENIZER)),
        Unit("tower", "tower", (_work("tower"),), (TOWER,), ("parts",)),
        Unit("teacher", "teacher", (_work("teacher"),), (TEACHER, CONTROL), ("parts",)),
        Unit("teacher_cache", "teacher_cache", (fill,), (TEACHER_CACHE,), ("teacher", llava), cache_recipes),
    ]
    # The host tokenises a dataset once and every run reads it: a run of one step, thrown away.
    for name in ("stage1", "stage2_validation", "stage2_test"):
        path, output = f"tokenized/{name}", f"tokenized/{name}_run"

        def tokenize_recipe(name: str = name, path: str = path, output: str = output) -> None:
            if name == "stage1":
                content = stage1(settings, first.number, output, None)
            else:
                split: StudySplit = "test" if name == "stage2_test" else "validation"
                content = stage2(settings, first.number, first.llava, output, None, split) | {"do_predict": False}
            _write(root / f"{path}.yaml", content | {"max_steps": 1, "per_device_train_batch_size": 1})

        units.append(Unit(path, "tokenized", (_train(f"{path}.yaml"),), (path, output), (llava,), tokenize_recipe))
    return units


def _seed(root: Path, settings: Settings, seed: Seed) -> list[Unit]:
    pretrain, select = f"{seed.folder}/pretrain.yaml", f"{seed.folder}/select.yaml"
    split: StudySplit = "test" if seed.number in settings.seeds else "validation"
    score = f"{seed.folder}/score_{split}.yaml"

    def write_scoring() -> None:
        _write(root / select, scoring(settings, seed.llava, "train", seed.selection))
        _write(root / score, scoring(settings, seed.llava, split, f"{seed.folder}/scores"))

    targets = [f"{mode}={seed.scores(split, mode)}" for mode in MODES]
    return [
        Unit(
            f"{seed.folder}/language_model",
            "language_model",
            (_train(pretrain),),
            (seed.language_model,),
            ("parts",),
            lambda: _write(root / pretrain, pretraining(settings, seed)),
        ),
        Unit(
            f"{seed.folder}/llava",
            "llava",
            (_work("llava", str(seed.number)),),
            (seed.llava,),
            (f"{seed.folder}/language_model", "tower"),
        ),
        Unit(
            f"{seed.folder}/selection",
            "selection",
            (_work("select", select, score, *targets),),
            (seed.selection, f"{seed.folder}/scores"),
            (f"{seed.folder}/llava", "teacher_cache"),
            write_scoring,
        ),
    ]


def _run(
    root: Path, settings: Settings, run: Run, name: str, number: int, split: StudySplit, weight: Callable[[], float]
) -> list[Unit]:
    method, seed = METHODS[name], Seed(number)

    def select(strategy: Strategy, m: int) -> list[str]:
        scores = ScoreFile.load(root / seed.heads).scores
        return [str(head) for head in choose_targets(scores, strategy, m, number)]

    def write_stage1() -> None:
        _write(
            root / run.recipe("stage1"), stage1(settings, number, run.stage(1), method.hera_keys(1, weight, select))
        )

    def write_stage2() -> None:
        keys = method.hera_keys(2, weight, select)
        _write(root / run.recipe("stage2"), stage2(settings, number, run.stage(1), run.stage(2), keys, split))

    def write_scoring() -> None:
        _write(root / run.recipe("score"), scoring(settings, run.stage(2), split, run.path))

    needed: tuple[str, ...] = ("teacher_cache", "tokenized/stage1", f"tokenized/stage2_{split}")
    needed += (f"{seed.folder}/selection",)
    if split == "test" and method.weight == "chosen":
        needed += ("tuning/choice",)
    scores = tuple(run.scores(mode) for mode in MODES)
    score = _work("score", run.recipe("score"), *(f"{mode}={run.scores(mode)}" for mode in MODES))
    names = [f"{run.path}/{unit}" for unit in ("stage1", "stage2", "score")]
    return [
        Unit(names[0], "stage1", (_train(run.recipe("stage1")),), (run.stage(1),), needed, write_stage1),
        Unit(names[1], "stage2", (_train(run.recipe("stage2")),), (run.stage(2),), (names[0],), write_stage2),
        Unit(names[2], "score", (score,), scores, (names[1],), write_scoring),
    ]


def _write(path: Path, recipe: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def _train(recipe: str) -> tuple[str, ...]:
    """The host's training command, which lies beside the interpreter."""
    beside = Path(sys.executable).with_name("llamafactory-cli")
    return (str(beside) if beside.exists() else beside.name, "train", recipe)


def _work(name: str, *arguments: str) -> tuple[str, ...]:
    """A function of ``work`` in a process of its own."""
    return (sys.executable, str(Path(__file__).resolve().with_name("work.py")), name, *arguments)
