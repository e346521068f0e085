"""Parses recipes with LLaMA-Factory's parser as one rank of a distributed run, and prints the result as JSON.

It runs in a process of its own, because parsing starts a process group, and ZeRO-3 leaves its mark on transformers.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from tests.e2e.runner import free_port


def main() -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output goes to standard error

    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args

    parsed = {}
    folder = tempfile.mkdtemp()
    for file in sys.argv[1:]:
        # the only change: this machine has no GPU that supports bf16
        keys = yaml.safe_load(Path(file).read_text(encoding="utf-8")) | {"use_cpu": True}
        for key, name in (("hera_heads", "L0H0"), ("hera_layers", "L0")):
            if str(keys.get(key)).endswith(".json"):  # written by stage 1
                keys[key] = os.path.join(folder, f"{key}.json")
                Path(keys[key]).write_text(json.dumps({key.removeprefix("hera_"): [name]}))
        _, data, training, finetuning, _ = get_train_args(keys)
        parsed[file] = {
            "use_hera": finetuning.use_hera,
            "template": data.template in TEMPLATES,
            "warmup": training.get_warmup_steps(1000),
            "zero3": training.deepspeed is not None and training.hf_deepspeed_config.is_zero3(),
        }
    json.dump(parsed, answers)
    answers.close()


if __name__ == "__main__":
    main()
