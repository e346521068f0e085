"""``llamafactory-hera eval``: one process for each task of each model, results that are resumed, the table."""

import fcntl
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ..files import read_json, write_json, write_text
from .card import write_index
from .models import default_dtype, load_processor, model_folders, weights_digest
from .suites import SUITES, Task, aggregate, definition

# what launchers and Trainers tell processes; a task is launched by itself
_LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
_ERROR = "error.txt"


def evaluate(
    models: Sequence[str],
    suite: str,
    tasks: Sequence[str] = (),
    data: str | os.PathLike | None = None,
    output: str | os.PathLike = "saves/eval",
    batch_size: int = 16,
    limit: int | None = None,
    check: bool = False,
    image_aspect_ratio: str = "none",
    names: Sequence[str] = (),
    paper: str | None = None,
) -> int:
    """Evaluates models on a suite, writes ``OUTPUT/<suite>.md``, ``.json`` and ``.png``, and prints the table.

    What belongs to a task lies in ``OUTPUT/<model>-<digest>/<task>``: ``result.json``, ``records.jsonl`` and
    ``answers.jsonl``, from which a run that was stopped goes on. A task that fails is named, and the others go on.

    The arguments are those of the command, whose help says them.

    Returns:
        0, or 1 where a task failed or is not ready.

    Raises:
        ValueError: An argument or a model; names it and the remedy, before anything runs.
    """
    chosen = _chosen(suite, tasks)
    folder = None if data is None else Path(data).absolute()
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--data: {data} is not a folder; give the one that holds {chosen[0].data}.")
    lacking = {task: "; ".join(what) for task, what in ready(chosen, folder).items()}
    if check:
        print("\n".join(f"{task.data}: {why or 'ready'}" for task, why in lacking.items()))
        return int(any(lacking.values()))
    named = _named(models, names)
    for key, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{key}: {value} is not a number of samples; give 1 or more, or leave it out.")
    if paper is not None and paper not in (known := read_json(Path(__file__).with_name("paper.json"))["backbones"]):
        raise ValueError(f"--paper: {paper} is not a backbone of the paper; choose {', '.join(known)}.")
    digests = {name: weights_digest(model_folders(model)) for name, model in named.items()}
    for model in named.values():
        load_processor(model)
    padded = "-pad" * (image_aspect_ratio == "pad")  # another way to ask, of its own results
    places = {name: Path(output) / f"{Path(model).name}-{digests[name][:8]}{padded}" for name, model in named.items()}
    Path(output).mkdir(parents=True, exist_ok=True)
    settings = {"dtype": default_dtype(), "image_aspect_ratio": image_aspect_ratio}
    failed = []
    for name, model in named.items():
        for task in chosen:
            job: dict[str, Any] = {"model": model, "digest": digests[name], "settings": settings, "task": task.name}
            job |= {"suite": suite, "limit": limit, "batch_size": batch_size, "data": folder and str(folder)}
            if why := lacking[task] or _run(task, job, places[name] / task.name):
                failed.append(f"{name}, {task.data}: {why}")
                continue
            result = read_json(places[name] / task.name / _file(limit))
            scores = ", ".join(f"{key} {value:.1f}" for key, value in result["scores"].items())
            print(f"{name}, {task.title} ({result['n']} samples{' of a limited run' if limit else ''}): {scores}")
    results = {
        name: {task: read_json(path) for task in SUITES[suite] if (path := place / task.name / _file(None)).is_file()}
        for name, place in places.items()
    }
    if limit is None and any(results.values()):
        from .table import write_table  # it takes seconds to import what draws

        for name, model in named.items():
            write_index(model_folders(model)[0], results[name])
        for path in write_table(Path(output), places, suite, paper):
            print(path.read_text(encoding="utf-8") if path.suffix == ".md" else path)
    if failed:
        print("\n".join(["Failed:", *failed]), file=sys.stderr)
    return int(bool(failed))


def ready(tasks: Sequence[Task], data: Path | None) -> dict[Task, list[str]]:
    """What each task lacks.

    Raises:
        ValueError: lmms-eval is not installed.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise ValueError('eval: lmms-eval is not installed; run pip install "llamafactory-hera[eval]".')
    return {task: missing(task, data) for task in tasks}


def missing(task: Task, data: Path | None) -> list[str]:
    """What a task needs and does not find; nothing is loaded."""
    given = local_data(task, data)
    lacks = [_unfit(given, task)] if given is not None else []
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    for need in task.needs:
        kind, _, name = need.partition(":")
        if kind == "data" and given is None:
            lacks.append(f"its data: give --data, a folder that holds {task.data} or {task.data}.json")
        elif kind == "token" and given is None and not offline:
            from huggingface_hub import get_token

            if get_token() is None:
                lacks.append(f"a token of the hub (`hf auth login`, or HF_TOKEN), or {task.data} in --data")
        elif kind == "nltk":
            from nltk import data as nltk_data

            try:
                nltk_data.find(name)
            except LookupError:
                lacks.append(f"nltk's {name}: python -m nltk.downloader {name.partition('/')[2]}")
        elif kind == "spacy" and importlib.util.find_spec(name) is None:
            lacks.append(f"spaCy's {name}: python -m spacy download {name}")
        elif kind == "env" and not Path(os.environ.get(name, "\0")).is_dir():
            lacks.append(f"the folder that {name} names: set it to AMBER's folder data, from its repository")
    if given is None and "data" not in task.needs and offline:
        lacks.append(f"its data: HF_HUB_OFFLINE is set; unset it, or give --data, a folder that holds {task.data}")
    return list(filter(None, lacks))


def _unfit(given: Path, task: Task) -> str:
    """Why data that lie here cannot be a task's, or nothing."""
    if given.is_file():
        try:
            rows = read_json(given)
        except ValueError as error:
            return f"its data: {error}"
        if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
            return f"its data: {given} is not a list of rows; write [{{...}}, ...]"
        for number, path in enumerate(row.get("image") for row in rows):
            if not (isinstance(path, str) and (given.parent / path).is_file()):
                return f"its data: image of row {number} (from 0) of {given} is {path!r}, not a file's path from there"
        return ""
    from datasets import DatasetDict, load_from_disk

    split = definition(task)["test_split"]
    try:
        found = load_from_disk(str(given))
    except (OSError, ValueError) as error:
        return f"its data: {given} is not a folder of save_to_disk ({error})"
    if isinstance(found, DatasetDict) and found.get(split):
        return ""
    return f"its data: {given} holds no split {split}; write DatasetDict({{'{split}': rows}}).save_to_disk(...) to it"


def local_data(task: Task, data: str | Path | None) -> Path | None:
    """Where a task's data lie in ``--data``: a folder of ``save_to_disk`` or a file of rows; None: at the hub."""
    places = [] if data is None else [Path(data, task.data), Path(data, f"{task.data}.json")]
    return next((path for path in places if path.exists()), None)


def _chosen(suite: str, tasks: Sequence[str]) -> list[Task]:
    if suite not in SUITES:
        raise ValueError(f"--suite: {suite} is unknown; choose {', '.join(SUITES)}.")
    known = {task.data: task for task in SUITES[suite]}
    tasks = [name for some in tasks for name in some.split(",") if name]
    for name in set(tasks) - set(known):
        raise ValueError(f"--tasks: {name} is not in the suite {suite}; it has {', '.join(known)}.")
    return [known[name] for name in known if not tasks or name in tasks]


def _named(models: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    if not models:
        raise ValueError("MODEL: none is named; give the folder of a model or an adapter, or a hub id.")
    if names and len(names) != len(models):
        raise ValueError(f"--names: {len(names)} names for {len(models)} models; give one for each.")
    short = [Path(model).name for model in models]
    named = dict(zip(names or (short if len(set(short)) == len(short) else models), models, strict=True))
    if len(named) < len(models):
        raise ValueError("--names: two models have the same name; give each one of its own.")
    return named


def _file(limit: int | None, name: str = "result.json") -> str:
    return name if limit is None else name.replace(".", "_limit.")


def _run(task: Task, job: dict[str, Any], folder: Path) -> str:
    """Runs a task in a process of its own, unless its result is there; returns why it failed, or nothing."""
    import torch

    job |= {"folder": str(folder.absolute()), "state": _state(task, job)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"another evaluation writes into {folder}; wait for it, or give another --output"
        try:
            if read_json(folder / _file(job["limit"]))["state"] == job["state"]:
                return ""
        except (ValueError, KeyError, TypeError):
            pass  # none yet, or not whole: it is made again, from the answers that are there
        (folder / _file(job["limit"])).unlink(missing_ok=True)  # of other data or settings: no table has it as today's
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
        environment |= {"LOGURU_LEVEL": environment.get("LOGURU_LEVEL", "WARNING"), "TOKENIZERS_PARALLELISM": "false"}
        # one for each accelerator
        n = int(environment.get("NPROC_PER_NODE") or torch.accelerator.device_count() or 1)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
        command = [sys.executable, *launcher, "-m", __name__, json.dumps(job)]
        (folder / _ERROR).unlink(missing_ok=True)
        status = subprocess.run(command, env=environment, pass_fds=[lock.fileno()], check=False).returncode
        told = (folder / _ERROR).read_text(encoding="utf-8") if (folder / _ERROR).is_file() else ""
    return told or f"its process ended with status {status}" if status else ""


def _state(task: Task, job: Mapping[str, Any]) -> str:
    """A digest of what a result depends on: the model, settings, the suite's files, data that lie here."""
    given = local_data(task, job["data"])
    digest = hashlib.sha256(json.dumps([job[key] for key in ("digest", "settings", "task", "limit")]).encode())
    for name in ("suites.py", "scoring.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    for path in [] if given is None else [given] if given.is_file() else sorted(given.rglob("*")):
        whole = path.suffix in (".json", ".jsonl") and path.is_file()  # such a folder's tables have their digest there
        digest.update(path.read_bytes() if whole else f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


# -- in the process of a task ----------------------------------------------------------------------------------------


def run_task(job: Mapping[str, Any]) -> None:
    """Evaluates one model on one task and writes ``records.jsonl``, then its result; ``job`` is that of `_run`."""
    from datasets import disable_progress_bars
    from lmms_eval.api.task import ConfigurableMessagesTask  # it has PIL take half an image for a whole one
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from PIL import ImageFile

    from ..selection.scores import package_versions
    from .vlm import HeraVLM

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    started, folder = time.perf_counter(), Path(job["folder"])
    task = next(task for task in SUITES[job["suite"]] if task.name == job["task"])
    config = definition(task)
    if (given := local_data(task, job["data"])) is not None:
        config |= _from_disk(given, config)
    disable_progress_bars()
    asked = ConfigurableMessagesTask(config=config, model_name="hera_vlm")
    if given is not None:
        _try_rows(task, asked, job["limit"], given)
    kept: dict[str, Any] = {"answers": folder / "answers.jsonl", "key": f"{job['digest']} {job['settings']['dtype']}"}
    model = HeraVLM(job["model"], job["batch_size"], **kept, **job["settings"])
    found = simple_evaluate(
        model=model,
        tasks=[asked],
        task_manager=TaskManager(include_defaults=False),
        batch_size=job["batch_size"],
        limit=job["limit"],
        bootstrap_iters=0,
        cli_args=Namespace(output_path=str(folder), process_with_media=False),
    )
    if model.rank > 0:
        return
    samples = {sample["doc_id"]: sample["hera"] for sample in found["samples"][task.name]}
    records = [samples[number] for number in sorted(samples)]
    write_text(
        folder / _file(job["limit"], "records.jsonl"),
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
    )
    result = {name: job[name] for name in ("task", "suite", "model", "digest", "settings", "limit", "state")}
    result |= {"n": len(records), "scores": aggregate(task.name, records), "prompt": model.prompts[min(samples)]}
    versions = package_versions() | {name: version(name) for name in ("lmms-eval", "datasets")}
    result |= {"versions": versions, "batch_size": job["batch_size"]}
    write_json(folder / _file(job["limit"]), result | {"seconds": round(time.perf_counter() - started, 1)})


def _try_rows(task: Task, asked: Any, limit: int | None, given: Path) -> None:
    """Makes each row's prompt and judges some answer: one that does not fit is found before a model is loaded."""
    for number, row in enumerate(islice(asked.eval_docs_no_media, limit)):
        try:
            asked.doc_to_text(row)
            task.record(row, ["a"])
        except Exception as error:  # of a template, or of another package's judge
            why = f"it has no column {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"--data: row {number} (from 0) of {given} is not one of {task.data}: {why}.") from error


def _from_disk(given: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a definition read its data from a folder of ``save_to_disk``, or a file of rows with image paths."""
    if given.is_dir():
        return {"dataset_path": str(given), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
    files = {"data_files": {config["test_split"]: str(given)}}
    opened = partial(_open_images, given.parent, config.get("process_docs"))
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, "process_docs": opened}


def _open_images(folder: Path, process: Any, rows: Any) -> Any:
    """Rows whose column ``image`` holds paths from a folder, with the images themselves."""
    from datasets import Image

    if "image" in rows.column_names:
        rows = rows.map(lambda row: {"image": str(folder / row["image"])}, keep_in_memory=True)
        rows = rows.cast_column("image", Image())
    return process(rows) if process else rows


if __name__ == "__main__":
    from ..distributed import end_launch

    asked_for = json.loads(sys.argv[1])
    try:
        run_task(asked_for)
    except Exception as error:
        tried = getattr(error, "last_attempt", None)  # lmms-eval tries some of its steps again
        cause = error if tried is None else tried.exception()
        if type(cause).__name__ == "DatasetGenerationError":
            cause = cause.__cause__ or cause
        *_, last = str(cause).strip().splitlines() or [""]
        ours = isinstance(cause, ValueError)
        told = last.removeprefix("ValueError: ") if ours else f"{type(cause).__name__}: {last}"
        write_text(Path(asked_for["folder"], _ERROR), told[:500])
        if ours:
            sys.exit(1)
        raise
    end_launch()
