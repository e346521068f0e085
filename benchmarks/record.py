"""Records the numbers that a restructuring must not change, and compares two records.

Run ``python -m benchmarks.record record FILE.json`` before and after restructuring (ten minutes each on two cores).
Then ``python -m benchmarks.record compare BEFORE.json AFTER.json`` prints all numbers that differ.
"""

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from tests.e2e.runner import ROOT, environment

SCORES = {
    "llm": [],
    "llm, text, k 5": ["hera_pooling=text", "hera_select_k=5"],
    "mllm": ["hera_select_mode=mllm"],
    "mllm, dot": ["hera_select_mode=mllm", "hera_similarity=dot"],
    "mllm, mean, 128 held out": ["hera_select_mode=mllm", "hera_pooling=mean", "dataset=hera_demo_heldout",
                                 "hera_select_samples=128"],
}  # fmt: skip
CALIBRATIONS = {"paper": [], "no CAF": ["rah_targets=no_caf", "rah_rank=4"], "prune": ["rah_update=prune"]}


def run(command: list[str], folder: Path) -> str:
    """Runs a command in a folder and returns its output; if the command fails, the recording stops."""
    print(" ".join(command)[-150:], flush=True)
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


def weights(folder: Path) -> str:
    """Returns a digest of the tensors in a folder and their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def log(folder: Path) -> list[dict[str, Any]]:
    """Returns the log lines of a run without its times."""
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in line.items() if not re.search("runtime|per_second|total_flos", k)} for line in lines]


def record() -> dict[str, Any]:
    """Runs the demo, scores, calibrations and gradients in a temporary folder, and returns their numbers."""
    folder, demo, found = Path(tempfile.mkdtemp()), ROOT / "recipes/demo", {}
    run([sys.executable, str(demo)], folder)
    found["demo"] = {name: weights(folder / "hera_demo" / name) for name in ("model", "teacher")}
    for name in ("sft", "hera"):
        run(["llamafactory-cli", "train", str(demo / f"{name}.yaml")], folder)
        saved = folder / f"saves/demo_{name}"
        found[f"{name} run"] = {"log": log(saved), "weights": weights(saved)}
    for name, keys in SCORES.items():
        out = folder / "scores.json"
        run(["llamafactory-hera", "score", str(demo / "hera.yaml"), "--output", str(out), *keys], folder)
        provenance = json.loads(out.read_text())["provenance"]
        found[f"scores {name}"] = {key: provenance[key] for key in ("scores", "layer_scores", "chance_level")}
    for name, keys in CALIBRATIONS.items():
        out = folder / f"calibration_{len(found)}"
        run(["llamafactory-hera", "calibrate", str(demo / "calibrate.yaml"), f"output_dir={out}", *keys], folder)
        found[f"calibration {name}"] = {"adapter": weights(out)}
    files = sorted(ROOT.glob("recipes/**/*.yaml"))
    found["recipes"] = {str(file.relative_to(ROOT)): yaml.safe_load(file.read_text("utf-8")) for file in files}
    tests = [sys.executable, "-m", "pytest", "tests/engines/test_gradients.py", "-q", "-p", "no:cacheprovider"]
    table = run(tests, ROOT)
    found["gradients"] = re.findall(r"^\| .*\|$", table, re.MULTILINE)
    return found


def differences(before: Any, after: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Lists the places where two records differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{path} / {key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{path}[{i}]")
        ]
    same = before == after or (before != before and after != after)
    return [] if same else [(path, before, after)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    if args.verb == "record":
        args.files[0].write_text(json.dumps(record(), indent=1))
        return
    before, after = (json.loads(file.read_text()) for file in args.files)
    found = differences(before, after)
    for path, old, new in found:
        both = isinstance(old, float | int) and isinstance(new, float | int)
        gap = f"  ({abs(new - old) / max(abs(old), 1e-12):.1e} relative)" if both and math.isfinite(old) else ""
        print(f"{path}: {old} -> {new}{gap}")
    print(f"{len(found)} differences")


if __name__ == "__main__":
    main()
