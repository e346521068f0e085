"""A process that imports the host once and forks a child for each call, such as a training run or a script.

The process runs no tensor operation, because a fork can hang after OpenMP has started its threads. It reads jobs as
JSON lines from standard input, and writes answers to standard output.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pkgutil import resolve_name


def _child(job: dict, rank: int) -> None:
    os.setsid()
    log = os.open(job["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["ranks"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["ranks"]),
            LOCAL_WORLD_SIZE=str(job["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(job["port"]),
        )
    sys.argv = ["llamafactory-cli"]
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        code = resolve_name(job["call"])(job["args"]) or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def script(arguments: list[str]) -> None:
    """Runs a Python file with arguments."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _run(job: dict) -> list[int]:
    children: dict[int, int] = {}
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            _child(job, rank)
        children[pid] = rank
    codes = [124] * job["ranks"]
    deadline = time.monotonic() + job["timeout"]
    while children and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif job.get("kill_when") and os.path.exists(job["kill_when"]):
            break
        else:
            time.sleep(0.02)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return codes


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # every child needs these modules, so they are imported once, before the forks
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import timm  # noqa: F401
    import transformers.models.siglip.modeling_siglip  # noqa: F401
    from llamafactory.train import tuner  # noqa: F401
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    import llamafactory_hera.integrations.llamafactory.workflow  # noqa: F401

    list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.keys())  # imports the configurations, as the host does for a model
    gc.freeze()  # otherwise, each child's garbage collector would walk all these objects
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
