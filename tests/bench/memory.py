"""What makes up for a small batch: MKNN of the aligned heads after runs that differ in their candidates alone.

    python recipes/demo
    python tests/bench/memory.py recipes/demo/hera.yaml [--epochs 2] [--output FOLDER]

Every run takes the same samples in optimizer steps of 16; HeRA compares them in batches of 16, or of 2 with
accumulation: with a memory, or by gradient caching. Heads are those that the recipe's selection finds on the
model before. Scores are of `llamafactory-hera score` on samples that no run has seen, whole model with image and text.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from llamafactory_hera.integrations.llamafactory.commands import score_checkpoint, select

SMALL = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
LARGE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
RUNS = {
    "SFT": LARGE | {"hera_weight": 0.0},
    "batch 16": LARGE,
    "batch 2, hera_memory 14": SMALL | {"hera_memory": 14},
    "batch 2, hera_memory 128": SMALL | {"hera_memory": 128},
    "batch 2, gradcache": SMALL | {"hera_accumulate": "gradcache"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--heldout", default="hera_demo_heldout", help="name of a dataset that is not trained on")
    parser.add_argument("--output", default="saves/bench_memory", type=Path)
    options = parser.parse_args()
    recipe = yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8"))
    heads = select(options.recipe, [f"output_dir={options.output}/selection"])
    names = [str(head) for head in heads.items]
    scoring = ["hera_select_mode=mllm", f"dataset={options.heldout}"]

    def mknn(checkpoint: str, name: str) -> tuple[float, float]:
        """Mean over the heads, and the chance level."""
        output = options.output / f"{name}_scores.json"
        score_checkpoint(checkpoint, options.recipe, output, scoring)
        provenance = json.loads(output.read_text(encoding="utf-8"))["provenance"]
        scores = [provenance["scores"][head.layer][head.head] for head in heads.items]
        return statistics.mean(scores), provenance["chance_level"]

    before, chance = mknn(recipe["model_name_or_path"], "before")
    print(f"heads {', '.join(names)}; {options.epochs} epochs; chance level {chance:.3f}", flush=True)
    print(f"| before | {before:.3f} |", flush=True)
    for name, changes in RUNS.items():
        folder = options.output / name.replace(", ", "_").replace(" ", "_")
        keys = recipe | {"hera_heads": ",".join(names), "hera_memory": 0, "num_train_epochs": options.epochs}
        keys |= {"hera_weight": 0.1} | changes | {"output_dir": str(folder), "plot_loss": False}
        file = options.output / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump(keys), encoding="utf-8")
        command = [f"{Path(sys.executable).parent}/llamafactory-cli", "train", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        print(f"| {name} | {mknn(str(folder), folder.name)[0]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
