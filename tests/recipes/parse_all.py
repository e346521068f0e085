"""Parses recipes with the host's own parser as one rank of a distributed run, and prints what came out, as JSON.

A process of its own: parsing starts a process group, and ZeRO-3 leaves its mark on transformers.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import yaml


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import get_train_args

    facts = {}
    folder = tempfile.mkdtemp()
    for file in sys.argv[1:]:
        # the only change: this machine has no GPU that supports bf16
        keys = yaml.safe_load(Path(file).read_text(encoding="utf-8")) | {"use_cpu": True}
        for key, name in (("hera_heads", "L0H0"), ("hera_layers", "L0")):
            if str(keys.get(key)).endswith(".json"):  # what stage 1 will have written
                keys[key] = os.path.join(folder, f"{key}.json")
                Path(keys[key]).write_text(json.dumps({key.removeprefix("hera_"): [name]}))
        model, data, training, finetuning, _ = get_train_args(keys)
        facts[file] = {
            "use_hera": finetuning.use_hera,
            "stage": finetuning.to_dict()["stage"],
            "heads": finetuning.hera_heads,
            "aligned": [finetuning.hera_objective, finetuning.hera_granularity, finetuning.hera_layers],
            "bf16": training.bf16,
            "warmup": training.get_warmup_steps(1000),
            "zero3": training.deepspeed is not None and training.hf_deepspeed_config.is_zero3(),
            "learning_rate": training.learning_rate,
            "finetuning": finetuning.finetuning_type,
            "bits": model.quantization_bit,
            "cutoff": data.cutoff_len,
            "template": data.template in TEMPLATES,
        }
    json.dump(facts, answers)
    answers.close()


if __name__ == "__main__":
    main()
