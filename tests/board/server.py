"""The host's web UI as a process of its own, and the browser that opens it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.e2e.runner import environment, free_port

SYSTEM_CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Board:
    """``llamafactory-cli webui`` in a folder; its process group is killed at the end.

    Args:
        folder: Where it is started.
        plugin: Whether the plugin is on.
    """

    def __init__(self, folder: Path, plugin: bool = True) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self._log = folder / "webui.log"
        host, port = self.address.split(":")
        self._environment = environment(
            GRADIO_SERVER_NAME=host,
            GRADIO_SERVER_PORT=port,
            GRADIO_ANALYTICS_ENABLED="False",
            BROWSER="/bin/true",
            PYTHONUNBUFFERED="1",  # the line that is waited for would stay in a buffer of the page's process
            HERA_DISABLE="0" if plugin else "1",
        )
        for _ in range(3):  # Gradio gives up when its first answer to itself takes seconds, as on busy cores
            self._process = self._start()
            if self._answers():
                return
            self.close()
        raise AssertionError(f"The web UI did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def _start(self) -> subprocess.Popen:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "llamafactory.cli", "webui"],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self, timeout: float = 240) -> bool:
        until = time.monotonic() + timeout
        while time.monotonic() < until and self._process.poll() is None:
            # the line comes after Gradio has found that it can be reached
            if "To create a public link" in self._log.read_text(errors="replace"):
                return True
            time.sleep(0.3)
        return False

    def processes(self) -> list[str]:
        """Command lines of what runs in the web UI's process group beside itself."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int(folder.name) != self._process.pid and os.getpgid(int(folder.name)) == self._process.pid:
                    found.append(folder.joinpath("cmdline").read_text().replace("\0", " "))
            except (OSError, ProcessLookupError):
                continue
        return [line for line in found if line]  # a zombie has none

    def wait_until_idle(self, timeout: float = 180) -> None:
        """Waits until nothing runs that a page has started: a test must not be refused because of one before it."""
        until = time.monotonic() + timeout
        while busy := [line for line in self.processes() if "llamafactory" in line]:
            assert time.monotonic() < until, f"still running after {timeout} s: {busy}"
            time.sleep(0.3)

    def listening(self) -> set[int]:
        """TCP ports on which the process group listens."""
        import psutil

        ports = set()
        for process in [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(True)]:
            ports |= {line.laddr.port for line in process.net_connections("tcp") if line.status == "LISTEN"}
        return ports

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=10)
