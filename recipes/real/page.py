"""What was measured, as a page with pictures; nothing is concluded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest, spearmanr

from llamafactory_hera.files import read_json, write_text
from llamafactory_hera.selection.pictures import new_figure, save_figure
from llamafactory_hera.selection.scores import ScoreFile
from pictures import KINDS, kind_of
from results import mean_interval

ROOT = "hera_real"
_TALK = {"template": "llava_vicuna", "default_system": "", "infer_dtype": "float32", "trust_remote_code": False}
_RUN = {"model_name_or_path": f"{ROOT}/stage1", "adapter_name_or_path": f"{ROOT}/runs/worst5_1-s0"}
#: Keys with which the host merges the adapter of a run with HeRA.
EXPORT = _RUN | _TALK | {"finetuning_type": "lora", "export_dir": f"{ROOT}/exported", "export_device": "cpu"}
_ORDERS = {
    "two disjoint sets of 600 names": ("half_a", "half_b"),
    "two teachers": ("half_a", "tower"),
    "names alone, and with their images": ("half_a", "mllm"),
}

_NOTE = (
    "MKNN on held-out emoji with their names (chance {:.3f}), the last twenty steps' loss of language modelling, "
    "and the share of held-out answers that are right. Brackets: 95 %, over seeds or, of one seed, over answers."
)


def write_page(seeds: Sequence[int], methods: Sequence[str]) -> Path:
    """Writes ``real.md`` from what has finished."""
    order = list(_scores("../selection/worst/hera/heads"))
    worst, top = order[:5], order[::-1][:5]
    lines = ["# HeRA on Gemma 3 270M", "", "![All heads](selection/worst/hera/heads.png)", ""]
    lines += [f"Worst: {' '.join(map(str, worst))}. Top: {' '.join(map(str, top))}.", ""]
    lines += _header("nearest neighbours' vote", "accuracy", "most frequent answer", "images")
    for encoder, kinds in read_json(f"{ROOT}/knowledge.json").items():
        lines += [f"| {encoder}: {kind} | " + " | ".join(f"{x:.3g}" for x in it) + " |" for kind, it in kinds.items()]
    lines += ["", *_header("order of the heads over", "rank correlation", "worst five in common", "top five")]
    for title, names in _ORDERS.items():
        one, other = map(_scores, names)
        same = [len(set(list(one)[cut]) & set(list(other)[cut])) for cut in (slice(5), slice(-5, None))]
        rho = spearmanr([one[head] for head in order], [other[head] for head in order]).statistic
        lines.append(f"| {title} | {rho:.2f} | {same[0]} | {same[1]} |")
    chance = ScoreFile.load(f"{ROOT}/scores/before.json").chance
    lines += ["", _NOTE.format(chance), "", *_header("", "worst-5", "top-5", "all", "loss", "name", *KINDS)]
    groups = (worst, top, order)
    before = [_interval([_mean("before", group)]) for group in groups]
    lines.append("| before | " + " | ".join(before) + " |" + " |" * (2 + len(KINDS)))
    for method in methods:
        runs = [f"{method}-s{seed}" for seed in seeds if Path(ROOT, f"done/{method}-s{seed}.json").is_file()]
        if runs:
            cells = [_interval([_mean(run, group) for run in runs]) for group in groups]
            cells.append(_interval([_loss(run) for run in runs]))
            right = [_right(run) for run in runs]
            cells += [_interval([np.mean(it[kind]) for it in right], right[0][kind]) for kind in ("name", *KINDS)]
            lines.append(f"| {method}, {len(runs)} seeds | " + " | ".join(cells) + " |")
    lines += ["", "![Held-out images, and what the exported model says](chat.png)", "", "![Heads](report.png)"]
    write_text(Path(ROOT, "real.md"), "\n".join(lines) + "\n")
    return Path(ROOT, "real.md")


def draw_chat() -> None:
    """Has the host's chat answer about held-out images with the exported model."""
    from llamafactory.chat import ChatModel

    talk = ChatModel(_TALK | {"model_name_or_path": EXPORT["export_dir"]})
    rows = [row for name in ("emoji", "shapes") for row in read_json(f"{ROOT}/data/{name}_heldout.json")[:8]]
    figure = new_figure(11.0, 4.0)
    for axes, row in zip(figure.subplots(2, 8).flat, rows, strict=True):
        (question, answer), image = row["messages"], f"{ROOT}/data/{row['images'][0]}"
        said = talk.chat([question], images=[image], do_sample=False, max_new_tokens=10)[0].response_text.strip()
        axes.imshow(Image.open(image))
        axes.set_axis_off()
        axes.set_title(f"{question['content'][8:]}\n{answer['content']}\n→ {said}", fontsize=6)
        print(f"{question['content'][8:]} {answer['content']} -> {said}")
    save_figure(figure, Path(ROOT, "chat.png"))


def _header(*titles: str) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---|" + "--:|" * (len(titles) - 1)]


def _scores(name: str) -> dict[Any, float]:
    return ScoreFile.load(f"{ROOT}/scores/{name}.json").ranked("head")


def _mean(name: str, heads: Sequence[Any]) -> float:
    scores = _scores(name)
    return float(np.mean([scores[head] for head in heads]))


def _interval(values: Sequence[Any], answers: Sequence[bool] = ()) -> str:
    """A mean with its interval: over seeds, or, of one seed, over its answers."""
    found = mean_interval([float(value) for value in values])
    low, high = found.low, found.high
    if low is None and answers:
        low, high = binomtest(sum(answers), len(answers)).proportion_ci(method="wilson")
    return f"{found.mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def _loss(run: str) -> float:
    logged = [entry for entry in read_json(f"{ROOT}/runs/{run}/trainer_state.json")["log_history"] if "loss" in entry]
    return float(np.mean([entry.get("lm_loss", entry["loss"]) for entry in logged[-2:]]))


def _right(run: str) -> dict[str, list[bool]]:
    """By kind of question whether each answer is exactly right; those about emoji come first."""
    lines = Path(ROOT, "runs", run, "answers/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[bool]] = {kind: [] for kind in ("name", *KINDS)}
    for i, line in enumerate(map(json.loads, lines)):
        said, answer = line["predict"].strip(), line["label"].strip()
        found["name" if i < len(lines) // 2 else kind_of(answer)].append(said == answer)
    return found
