"""Measures the time that the plugin adds to every start of Python: ``python benchmarks/start.py [--rounds 150]``.

Python starts alternately in two environments, without and with the plugin. Both environments have as many entries in
site-packages as the environment that runs this script, because Python lists that folder at the first import.
"""

import argparse
import compileall
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

PATCHES = Path(__file__).parents[1] / "patches"


def environment(folder: Path, plugin: bool) -> Path:
    """Makes an empty virtual environment with or without the plugin's hook, and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for other in Path(sysconfig.get_path("purelib")).iterdir():
        if other.suffix != ".pth" and not other.name.startswith("hera_patches"):
            (site / other.name).mkdir(exist_ok=True)
    if plugin:
        shutil.copy(PATCHES / "llamafactory_hera_patches.pth", site)
        shutil.copytree(PATCHES / "hera_patches", site / "hera_patches")
        compileall.compile_dir(site / "hera_patches", quiet=1)  # as pip does
    return folder / "bin/python"


def milliseconds(python: Path) -> float:
    """Returns the wall time of a process that does nothing."""
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        without, with_it = (environment(Path(folder, str(plugin)), plugin) for plugin in (False, True))
        pairs = [(milliseconds(without), milliseconds(with_it)) for _ in range(rounds)]
    plain, plugin = (statistics.median(times) for times in zip(*pairs, strict=True))
    added = statistics.median(b - a for a, b in pairs)
    print(f"{rounds} starts each: without {plain:.2f} ms, with {plugin:.2f} ms, median of differences {added:.2f} ms")


if __name__ == "__main__":
    main()
