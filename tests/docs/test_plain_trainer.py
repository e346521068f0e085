"""The code of docs/plain_trainer.md runs as it stands there."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

PAGE = Path(__file__).parents[2] / "docs/plain_trainer.md"


def test_the_trainer_of_the_page_trains_the_heads(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) < 30
    names: dict = {}
    exec(code, names)  # the page's own code

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    rows = [
        {"input_ids": (ids := torch.randint(0, 32, (6,))), "labels": ids, "teacher_features": torch.randn(5)}
        for _ in range(8)
    ]

    def weights(hera_weight: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=4, max_steps=2, remove_unused_columns=False, report_to="none",
            use_cpu=True, save_strategy="no", disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        names["HeraTrainer"](model, arguments, train_dataset=rows, heads="L0H1,L1H3", k=2, weight=hera_weight).train()
        return model.state_dict()

    without, with_hera = weights(0.0), weights(1.0)
    changed = {name for name in without if not torch.equal(without[name], with_hera[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.layers.1.self_attn.o_proj.weight" in changed
