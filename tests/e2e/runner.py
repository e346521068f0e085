"""Starts training runs in real processes, through the fork server or from a command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Output = tuple[int, str]
ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """Finds a free TCP port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra: str) -> dict[str, str]:
    """Returns the environment of an offline run with one thread; PATH starts with the folder of this interpreter."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **OFFLINE, "PATH": path, **extra}


@dataclass(frozen=True)
class Run:
    """A finished run: its exit codes by rank, and its complete output."""

    codes: list[int]
    output: str
    folder: Path

    @property
    def ok(self) -> bool:
        return not any(self.codes)

    @property
    def error(self) -> str:
        """The error message at the end of the run."""
        return self.output.rpartition("Error: ")[2]

    def logs(self) -> list[dict[str, Any]]:
        """The training lines of trainer_state.json."""
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [line for line in history if "loss" in line]


class HostServer:
    """A client of the fork server in ``tests/e2e/server.py``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.server"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout.readline().strip() == "ready"

    def run(
        self,
        args: dict[str, Any],
        cwd: Path,
        ranks: int = 1,
        timeout: float = 180,
        env: dict[str, str] | None = None,
        call: str = "run_exp",
        kill_when: Path | None = None,
    ) -> Run:
        """Runs the host's ``run_exp`` or ``export_model``, and kills it after a timeout or when a file exists."""
        folder = Path(cwd) / args.get("output_dir", args.get("export_dir"))
        logs = [Path(f"{cwd}/{folder.name}.rank{rank}.log") for rank in range(ranks)]
        codes = self._call(f"llamafactory.train.tuner:{call}", args, cwd, logs, timeout, env or {}, kill_when)
        return Run(codes, "\n".join(log.read_text(errors="replace") for log in logs), folder)

    def command(
        self, *arguments: object, cwd: Path, call: str = "llamafactory_hera.cli:main", ranks: int = 1, **env: str
    ) -> Output:
        """Runs ``llamafactory-hera`` or another entry point; returns its exit code and its output."""
        logs = [cwd / f"{call.replace(':', '.')}.rank{rank}.log" for rank in range(ranks)]
        codes = self._call(call, [*map(str, arguments)], cwd, logs, 600, env)
        return max(codes, key=abs), "\n".join(log.read_text(errors="replace") for log in logs)

    def script(self, *arguments: object, **options: Any) -> Output:
        """Runs a Python file; returns its exit code and its output."""
        return self.command(*arguments, call="tests.e2e.server:script", **options)

    def _call(
        self,
        call: str,
        args: Any,
        cwd: Path,
        logs: list[Path],
        timeout: float,
        env: dict[str, str],
        kill_when: Path | None = None,
    ) -> list[int]:
        job = {"call": call, "args": args, "cwd": str(cwd), "logs": [*map(str, logs)], "timeout": timeout, "env": env}
        job |= {"ranks": len(logs), "port": free_port(), "kill_when": kill_when and str(kill_when)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


def run_command(command: list[str], cwd: Path, timeout: float = 180, **env: str) -> Output:
    """Runs a command without input; returns its exit code (124 if a timeout killed its group) and its output."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return 124, output


def write_recipe(path: Path, args: dict[str, Any]) -> Path:
    """Writes ``args`` as a YAML recipe."""
    path.write_text(yaml.safe_dump(args), encoding="utf-8")
    return path


def write_dataset(folder: Path, rows: list[dict[str, Any]], **entry: Any) -> None:
    """Writes the ``rows`` dataset, and its entry in LLaMA-Factory's ``dataset_info.json``."""
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", **entry}}))


class FileRuns:
    """Runs a host's command on ``config.yaml``; the ``keys`` make it train for 4 steps and save two checkpoints."""

    def __init__(self, keys: dict[str, Any], module: str, *arguments: str) -> None:
        self._keys, self._command = keys, [sys.executable, "-m", module, *arguments]

    def __call__(self, folder: Path, **changes: Any) -> Run:
        """Trains in a folder, with changed keys; fails if the command fails."""
        folder.mkdir(exist_ok=True)
        write_recipe(folder / "config.yaml", self._keys | changes)
        code, output = run_command(self._command, folder, timeout=400)
        assert not code, output
        return Run([code], output, folder / "saves/checkpoint-4")

    def check_resumed(self, run: Run, folder: Path, tolerance: float = 0, **changes: Any) -> None:
        """Resumes a run after its second step, and compares its values with those of the uninterrupted run."""
        shutil.copytree(run.folder.with_name("checkpoint-2"), folder / "saves/checkpoint-2")
        resumed = self(folder, resume_from_checkpoint="saves/checkpoint-2", **changes).logs()
        assert [line["step"] for line in resumed] == [1, 2, 3, 4]
        for line, uninterrupted in zip(resumed, run.logs(), strict=True):
            for key in {"loss", "hera_loss", "hera_mknn", "hera_temperature"} & uninterrupted.keys():
                assert abs(line[key] - uninterrupted[key]) <= tolerance * abs(uninterrupted[key])


def check_selected(run: Run, count: int, samples: int) -> None:
    """Checks that a run selected ``count`` heads on ``samples`` samples, and aligned these heads."""
    chosen = json.loads((run.folder.parent / "hera/heads.json").read_text())
    assert len(chosen["heads"]) == count
    assert chosen["provenance"]["samples"] == samples
    assert f"HeRA | heads: {','.join(chosen['heads'])}" in run.output
