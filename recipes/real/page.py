"""The measurements of ``make real``, and the page that shows them with pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest, sem, spearmanr, t

from llamafactory_hera.files import read_json, write_json, write_text
from llamafactory_hera.plots import new_figure, save_figure
from llamafactory_hera.selection.scores import ScoreFile

_CHOICES, _MEASURED = 8, ("own name", "own image")
_ORDERS = {
    "two disjoint sets of 600 names": ("half_a", "half_b"),
    "two teachers": ("half_a", "tower"),
    "names alone, and names after their images": ("half_a", "mllm"),
}
_NOTE = """\
MKNN is measured on {} held-out emoji with their names (chance {:.3f}). The loss is the language-modeling loss of the
last twenty steps. Own name is the share of images after which the right name is the most likely of eight names. Own
image is the share of names that their own image makes more likely than seven other images do (chance 0.125 each).
Brackets are 95 % intervals over seeds or, with one seed, over emoji.
"""


def write_choices(root: Path, folder: Path, adapter: Path | None = None) -> None:
    """Writes, for each held-out emoji, whether its own name and its own image are the most likely of eight.

    Without an adapter, the model of stage 1 is measured.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(root / "stage1", dtype=torch.bfloat16)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    processor = AutoProcessor.from_pretrained(root / "stage1")
    rows, found = read_json(root / "data/heldout.json"), {name: [] for name in _MEASURED}
    for start in range(0, len(rows), _CHOICES):
        part = rows[start : start + _CHOICES]
        images = [Image.open(root / "data" / row["images"][0]) for row in part]
        # LLaMA-Factory's llava_plain template encodes the image, the caption and a line break.
        texts = [f"<image>{row['response']}\n" for row in part]
        batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        pixels = batch.pop("pixel_values").to(torch.bfloat16).repeat_interleave(len(part), dim=0)
        batch = {name: tokens.repeat(len(part), 1) for name, tokens in batch.items()}
        ids, attended = batch["input_ids"], batch["attention_mask"]
        first = int((ids[0] == model.config.image_token_id).nonzero()[-1]) + 1
        with torch.inference_mode():
            kept = torch.arange(first - 1, ids.shape[1] - 1)
            logits = model(**batch, pixel_values=pixels, logits_to_keep=kept, use_cache=False).logits
            known = logits.float().log_softmax(-1).gather(-1, ids[:, first:, None])[..., 0]
        likely = (known * attended[:, first:]).sum(-1).view(len(part), len(part))  # [image, name], in nats
        for axis, name in zip((1, 0), _MEASURED, strict=True):
            found[name] += (likely.argmax(axis) == torch.arange(len(part))).tolist()
    write_json(folder / "choices.json", found)


def draw_chat(root: Path, exported: Path) -> None:
    """Names held-out images with the exported model in LLaMA-Factory's chat, and draws them in ``chat.png``."""
    from llamafactory.chat import ChatModel

    talk = ChatModel({"model_name_or_path": str(exported), "template": "llava_plain", "infer_dtype": "float32"})
    figure = new_figure(11.0, 4.0)
    for axes, row in zip(figure.subplots(2, 8).flat, read_json(root / "data/heldout.json"), strict=False):
        image = str(root / "data" / row["images"][0])
        turn = [{"role": "user", "content": row["prompt"]}]
        response = talk.chat(turn, images=[image], do_sample=False, max_new_tokens=12)[0].response_text
        axes.imshow(Image.open(image))
        axes.set_axis_off()
        axes.set_title(
            "\n".join(fill(text, 24) for text in (row["response"], f"→ {response.partition(chr(10))[0]}")), fontsize=6
        )
    save_figure(figure, exported / "chat.png")


def write_page(root: Path, seeds: Sequence[int], methods: Sequence[str]) -> Path:
    """Writes ``real.md`` from the finished steps, and returns it."""
    scores = {path.parent.name: ScoreFile.load(path).ranked("head") for path in root.glob("scores/*/heads.json")}
    order = list(ScoreFile.load(root / "selection/worst/hera/heads.json").ranked("head"))
    groups = worst, top, _ = order[:5], order[::-1][:5], order
    lines = ["# HeRA on Gemma 3 270M", "", "![All heads](selection/worst/hera/heads.png)", ""]
    lines += [f"Worst: {' '.join(map(str, worst))}. Top: {' '.join(map(str, top))}.", ""]
    known = read_json(root / "knowledge/knowledge.json")
    titles = "last word of held-out names, by the nearest images", "right", "most frequent word", "images"
    lines += _table(*titles, rows=[(name, *(f"{value:.3g}" for value in values)) for name, values in known.items()])
    rows: list[Any] = []
    for title, names in _ORDERS.items():
        one, other = (scores[name] for name in names)
        same = [len({*list(one)[end]} & {*list(other)[end]}) for end in (slice(5), slice(-5, None))]
        rho = spearmanr([one[head] for head in order], [other[head] for head in order]).statistic
        rows.append((title, f"{rho:.2f}", *map(str, same)))
    lines += _table("order of the heads over", "rank correlation", "worst five in common", "top five", rows=rows)
    before, rows = ScoreFile.load(root / "scores/before/heads.json"), []
    for method in ("before", *methods):
        runs = ["before"] if method == "before" else [f"{method}-s{seed}" for seed in seeds]
        runs = [run for run in runs if (root / "choices" / run).is_dir()]
        if runs:
            cells = [_interval([np.mean([scores[run][head] for head in heads]) for run in runs]) for heads in groups]
            cells.append("" if method == "before" else _interval([_loss(root / "runs" / run) for run in runs]))
            right = [read_json(root / "choices" / run / "choices.json") for run in runs]
            cells += [_interval([np.mean(it[kind]) for it in right], right[0][kind]) for kind in _MEASURED]
            rows.append((method, str(len(runs)), *cells))
    lines.append(_NOTE.format(before.provenance["samples"], before.chance))
    lines += _table("", "seeds", "worst-5", "top-5", "all", "loss", *_MEASURED, rows=rows)
    lines += ["![Held-out emoji, and what the exported model calls them](exported/chat.png)", ""]
    write_text(root / "real.md", "\n".join([*lines, "![Worst and top heads](report/report.png)"]) + "\n")
    return root / "real.md"


def _table(*titles: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    rule = ("---", *("--:" for _ in titles[1:]))
    return [*(f"| {' | '.join(row)} |" for row in (titles, rule, *rows)), ""]


def _interval(values: Sequence[Any], answers: Sequence[bool] = ()) -> str:
    """Formats a mean with its 95 % interval: Student's t over seeds or, for one seed, Wilson's over its answers."""
    mean = f"{np.mean(values):.3f}"
    if len(values) > 1:
        low, high = t.interval(0.95, len(values) - 1, np.mean(values), sem(values))
    elif answers:
        low, high = binomtest(sum(answers), len(answers)).proportion_ci(method="wilson")
    return f"{mean} [{low:.3f}, {high:.3f}]" if len(values) > 1 or answers else mean


def _loss(run: Path) -> float:
    logged = [entry for entry in read_json(run / "trainer_state.json")["log_history"] if "loss" in entry]
    return float(np.mean([entry.get("lm_loss", entry["loss"]) for entry in logged[-2:]]))
