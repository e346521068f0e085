"""The ``llamafactory-hera eval`` command: runs the tasks that have no result yet, and writes the table."""

import gc
import hashlib
import importlib.util
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from ..files import check_replaceable, read_json, write_json
from .suites import SUITES, Task
from .table import write_table


def evaluate(args: Namespace, image_newline: Callable[[Path], bool] = lambda folder: False) -> int:
    """Evaluates models on a suite, writes ``OUTPUT/<suite>.md`` and ``.json``, and prints the table.

    ``image_newline`` returns True for a folder whose model was trained with a line break after the images. The exit
    status is 1 if a task failed or a requirement is missing; in a single-process run, the other tasks still run.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError("eval: lmms-eval is not installed; run pip install lmms-eval==0.7.3.")
    suite, file = args.suite, Path(args.suite).absolute()
    data = args.data and Path(args.data).absolute()
    members: Sequence[Task] = SUITES.get(suite, ())
    if file.suffix == ".json" and file.is_file():  # the user's questions
        members = [replace(SUITES["demo"][0], name=file.stem, title=file.stem)]
        suite, data = f"own_{file.stem}", file.parent  # the prefix prevents a clash with the name of a suite
    elif not members:
        raise ValueError(f"--suite: {suite} is unknown; choose {', '.join(SUITES)}, or a .json file of questions.")
    if data and not data.is_dir():
        raise ValueError(f"--data: {data} is not a folder; give the folder that contains {members[0].name}.")
    task_names = [task.name for task in members]
    if unknown := set(args.tasks) - set(task_names):
        raise ValueError(f"--tasks: {min(unknown)} is not in the suite {suite}; choose from {', '.join(task_names)}.")
    lacking = {task: "; ".join(missing(task, data)) for task in members if task.name in (args.tasks or task_names)}
    if args.check:
        print(*(f"{task.name}: {f'lacks {lacks}' if lacks else 'ready'}" for task, lacks in lacking.items()), sep="\n")
        return int(any(lacking.values()))
    names = args.names or [Path(model).name for model in args.models]
    if not names or not len(set(names)) == len(names) == len(args.models):
        raise ValueError("MODEL: give one or more models, each with a different name (--names).")
    from .vlm import model_folders, weights_digest  # importing torch takes time

    options, results = {}, {}
    for name, pretrained in zip(names, args.models, strict=True):
        folders = model_folders(pretrained)
        settings = {"image_aspect_ratio": args.image_aspect_ratio, "image_newline": any(map(image_newline, folders))}
        settings |= {"key": weights_digest(folders)}
        root = Path(args.output, f"{Path(pretrained).name}-{settings['key'][:8]}")
        results[name] = {task: root / _folder(task, data, [settings, args.limit]) / "result.json" for task in members}
        options[name] = {"pretrained": pretrained, "answers": f"{root}/answers.jsonl", **settings}
    path = Path(args.output, suite + (f"-limit{args.limit}" if args.limit else ""))
    check_replaceable({f"{path}.json": '"suite"', f"{path}.md": "| benchmark"})
    # All processes agree on this list, because it is made before the first result is written.
    ready = [(name, task) for name in names for task, lacks in lacking.items() if not lacks]
    due = [(name, task) for name, task in ready if not results[name][task].is_file()]
    failed = [f"{task.name}: lacks {lacks}" for task, lacks in lacking.items() if lacks]
    failed += _run(args, due, results, options, data) if due else []
    if os.environ.get("RANK", "0") != "0":
        return int(bool(failed))  # the first process reports
    if any(results[name][task].is_file() for name, task in ready):
        page, *others = write_table(path, members, results, args.paper)
        print(page.read_text(encoding="utf-8"), *others, sep="\n")
    if failed:
        print("\n".join(["Failed:", *failed]), file=sys.stderr)
    return int(bool(failed))


def missing(task: Task, data: Path | None) -> list[str]:
    """Lists the missing requirements of a task, with remedies."""
    local, lacks = task.find(data), []
    if local is None and ("data" in task.needs or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")):
        lacks.append(f"its data (set --data to a folder that contains {task.name} or {task.name}.json)")
    elif local is None and "token" in task.needs and get_token() is None:
        lacks.append(f"a hub token (run hf auth login, or set --data to a folder that contains {task.name})")
    for kind, _, name in (need.partition(":") for need in task.needs):
        if kind == "nltk":
            import nltk

            places = [Path(folder, name + suffix) for folder in nltk.data.path for suffix in ("", ".zip")]
            if not any(place.exists() for place in places):
                lacks.append(f"nltk's {name} (run python -m nltk.downloader {Path(name).name})")
        elif kind == "spacy" and importlib.util.find_spec(name) is None:
            lacks.append(f"spaCy's {name} (run python -m spacy download {name})")
        elif kind == "env" and not Path(os.environ.get(name, "\0")).is_dir():
            lacks.append(f"AMBER's data (set {name} to the folder `data` of AMBER's repository)")
    if local is not None and local.is_file():
        row = None
        try:
            for row in read_json(local):
                (local.parent / row["image"]).stat()  # fails if the file is missing
                if task.rows is None:
                    task.record(row, [""])
        except Exception as error:  # the task's judge may raise any error
            lacks.append(f"valid rows ({local}: {error!r} in {row})")
    return lacks


def _folder(task: Task, data: Path | None, settings: Sequence[Any]) -> str:
    """Returns the name of a result's folder: the task, and a digest of the settings, the scoring and the data."""
    digest, local = hashlib.sha256(json.dumps(settings).encode()), task.find(data)
    files = [] if local is None else [local] if local.is_file() else sorted(local.rglob("*.json"))
    for path in (*(Path(__file__).with_name(name) for name in ("suites.yaml", "suites.py", "scoring.py")), *files):
        digest.update(path.read_bytes())
    return f"{task.name}-{digest.hexdigest()[:8]}"


def _run(args: Namespace, due: list, results: dict, options: dict, data: Path | None) -> list[str]:
    """Runs tasks on models and returns the failures."""
    from datasets import disable_progress_bars
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from PIL import ImageFile

    from ..selection.scores import package_versions
    from .vlm import HeraVLM

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval sets it to True, which hides broken files
    disable_progress_bars()
    run = partial(simple_evaluate, limit=args.limit, bootstrap_iters=0, cli_args=Namespace(process_with_media=False))
    manager = TaskManager(include_defaults=False)
    versions = package_versions() | {name: version(name) for name in ("lmms-eval", "datasets")}
    failed, current, model = [], "", None
    for name, task in due:
        try:
            if name != current:
                current, model = name, None
                gc.collect()  # frees the memory of the previous model
                model = HeraVLM(**options[name], batch_size=args.batch_size)
            if model is None:
                continue  # the model could not be loaded
            lmms_task = ConfigurableMessagesTask(config=task.definition(data), model_name="hera_vlm")
            output = run(model=model, tasks=[lmms_task], task_manager=manager)
            if output is None:
                continue  # only the first process gets the result
            samples = sorted(output["samples"][task.name], key=lambda sample: sample["doc_id"])
            records = [sample["hera"] for sample in samples]
            result = {"task": task.name, "n": len(records), "scores": task.aggregate(records), "limit": args.limit}
            result |= {"settings": options[name], "versions": versions, "records": records}
            write_json(results[name][task], result)
        except Exception as error:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise  # the other processes would wait for this one
            retried = getattr(error, "last_attempt", None)  # lmms-eval retries some calls
            cause = retried.exception() if retried else error
            if not isinstance(cause, ValueError):
                traceback.print_exc()
            *_, reason = f"{type(cause).__name__}: {cause}".strip().splitlines()  # the last line, below any traceback
            failed.append(f"{name}, {task.name}: {reason.removeprefix('ValueError: ')[:300]}")
    return failed
