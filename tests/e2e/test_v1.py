"""HeRA in the host's v1 engine: two processes train like one, and the HeRA term has the right weight."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .runner import free_port, run_command, write_recipe

pytest.importorskip("llamafactory.v1.core.rendering", reason="v1 supports images only on the host's main branch")
from llamafactory.v1.accelerator.interface import DistributedInterface
from llamafactory.v1.config import get_args
from llamafactory.v1.core.data_engine import DataEngine
from llamafactory.v1.core.model_engine import ModelEngine
from llamafactory.v1.trainers.sft_trainer import SFTTrainer

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.llamafactory_v1 import HeraV1Trainer, run

pytestmark = pytest.mark.slow
# Under torchrun, the engine synchronizes with an accelerator, which a CPU does not have. This script skips that call.
ON_CPU = """import runpy, torch
torch.accelerator.synchronize = lambda: None
runpy.run_module("llamafactory_hera.integrations.llamafactory_v1", run_name="__main__")
"""
HERA = {"hera_heads": "L1H0,L2H5", "hera_teacher": "hera_demo/teacher", "hera_k": 3, "hera_weight": 1.0}


@pytest.fixture(scope="module")
def recipe(world: Path) -> dict[str, Any]:
    """A recipe for the engine, with the first turn of each conversation in the demo."""
    rows = []
    for row in json.loads((world / "hera_demo/data/demo_train.json").read_text()):
        question, answer = (message["content"] for message in row["messages"][:2])
        image = {"type": "image_url", "value": f"hera_demo/data/{row['images'][0]}"}
        user_turn = [image, {"type": "text", "value": question.removeprefix("<image>\n")}]
        turns = [user_turn, [{"type": "text", "value": answer}]]
        rows.append(
            {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns, strict=True)]}
        )
    (world / "v1.json").write_text(json.dumps(rows))
    args = {"model": "hera_demo/model", "train_dataset": "v1.json", "bf16": False, "flash_attn": "eager"}
    args |= {"batching_workers": 0, "max_steps": 2, "cutoff_len": 256, "max_grad_norm": 1e9}
    return args | {"learning_rate": 1e-3, "enable_activation_checkpointing": False}


def test_two_processes_train_like_one(world, recipe):
    logs = []
    for ranks in (1, 2):
        output = f"saves/v1_{ranks}"
        sizes = {"micro_batch_size": 16 // ranks, "global_batch_size": 16, "output_dir": output}
        file = write_recipe(world / "v1.yaml", recipe | HERA | sizes)
        command = [sys.executable, "-m", "llamafactory_hera.integrations.llamafactory_v1", str(file)]
        if ranks > 1:
            (world / "on_cpu.py").write_text(ON_CPU)
            launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
            command = [*launcher, "on_cpu.py", str(file)]
        code, printed = run_command(command, world)
        assert code == 0, printed
        assert {"heads.json", "run.json", "state.safetensors"} <= set(os.listdir(world / output / "hera"))
        logs.append([json.loads(line) for line in (world / output / "trainer_log.jsonl").read_text().splitlines()])
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "hera_loss", "hera_mknn"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_the_term_is_averaged_over_micro_batches_and_the_lm_loss_over_tokens(world, recipe, monkeypatch):
    monkeypatch.chdir(world)
    args = recipe | {"micro_batch_size": 8, "global_batch_size": 16, "max_steps": 1, "output_dir": "saves/v1_gradient"}
    model_args, data_args, training_args, _ = get_args(dict(args))
    DistributedInterface(training_args)
    engine = ModelEngine(model_args, is_train=True)
    trainer = HeraV1Trainer(
        hera=HeraConfig.from_keys(HERA),
        args=training_args,
        model=engine.model,
        renderer=engine.renderer,
        train_dataset=DataEngine(data_args.train_dataset),
    )
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    batches = next(iter(trainer.train_batch_generator))
    tokens = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert len(set(tokens)) == 2  # otherwise, both means would be equal
    expected = torch.zeros(())
    for batch, count in zip(batches, tokens, strict=True):
        inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        collator = trainer.aligner.collator(lambda rows, inputs=inputs: inputs)
        prepared = trainer.aligner.prepare(collator([{"images": json.loads(names)} for names in batch["extra_info"]]))
        lm_loss = SFTTrainer.compute_loss(trainer, batch)
        expected = expected + lm_loss * count / sum(tokens) + trainer.aligner.loss(prepared) / 2
    expected_gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    found: list[torch.Tensor | None] = []
    hook = lambda *_: found.extend(None if p.grad is None else p.grad.clone() for p in parameters)  # noqa: E731
    trainer.optimizer.register_step_pre_hook(hook)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.0 if step else 1.0)
    before = trainer.aligner.objective.log_temperature.item()
    trainer.fit()
    moved = abs(trainer.aligner.objective.log_temperature.item() - before)
    assert moved == pytest.approx(1e-3, rel=0.01)  # by the learning rate of this step, not of the next one
    for gradient, reference in zip(found, expected_gradients, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


REFUSED: dict[str, Any] = {"cp_size": 2, "batching_strategy": "padding_free"}
REFUSED |= {"dist_config": {"name": "deepspeed"}, "resume_from_checkpoint": "saves/x"}
REFUSED |= {"hera_select_dataset": "captions", "hera_accumulate": "gradcache"}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_do_not_work_are_refused_before_anything_is_loaded(key):
    with pytest.raises(ValueError, match=f"^{key}.* does not work with HeRA in the v1 engine: "):
        run({"model": "none", "train_dataset": "none", "output_dir": "none", **HERA, key: REFUSED[key]})
