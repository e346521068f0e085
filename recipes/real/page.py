"""The measurements of ``make real``, and the page that shows them with pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import sem, spearmanr, t

from llamafactory_hera.files import read_json, write_json, write_text
from llamafactory_hera.plots import new_figure, save_figure
from llamafactory_hera.selection.scores import ScoreFile

from .run import METHODS

_CHOICES, _MOST_SEEDS = 8, 100
#: The names of the measurements of `write_choices` for each held-out picture, and their column titles.
_MEASURED = {"loss": "loss", "own_name": "own name", "own_picture": "own picture"}
_ORDERS = {
    "two disjoint halves of the training captions": ("half_a", "half_b"),
    "teachers Lite0 and Lite2": ("half_a", "lite2"),
    "teachers Lite0 and the tower": ("half_a", "tower"),
    "captions alone, and captions after their pictures": ("half_a", "mllm"),
}
_NOTE = """\
MKNN is measured on {} held-out pictures with their captions (chance {:.3f}). The loss is the language-modeling loss of
their captions, in nats per token. Own name is the share of pictures that make their own caption the most likely of
eight. Own picture is the share of captions that their own picture makes more likely than seven other pictures do
(chance 0.125 each). Brackets are 95% intervals (Student's t) over seeds or, for one seed, over pictures.
"""


def write_choices(root: Path, folder: Path, adapter: Path | None = None) -> None:
    """Writes each held-out picture's caption loss, and the results of choosing caption and picture out of eight.

    Without an adapter, the model of stage 1 is measured.
    """
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(root / "stage1", dtype=torch.bfloat16)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    processor = AutoProcessor.from_pretrained(root / "stage1")
    found: dict[str, list[Any]] = {name: [] for name in _MEASURED}
    # The eight captions of a choice have similar lengths, so that length does not decide.
    rows = sorted(read_json(root / "data/heldout.json"), key=lambda row: len(processor.tokenizer(row["response"])[0]))
    for start in range(0, len(rows), _CHOICES):
        part = rows[start : start + _CHOICES]
        count, images = len(part), [Image.open(root / "data" / row["images"][0]) for row in part]
        # LLaMA-Factory's llava_plain template encodes the BOS token, the image, the caption and a line break.
        starts = [f"{processor.tokenizer.bos_token}<image>"] * count
        prompt = processor(text=starts, images=images, return_tensors="pt")
        texts = [f"{row['response']}\n" for row in part]
        names = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            seen = model(**prompt.to(torch.bfloat16), use_cache=True)
            seen.past_key_values.batch_repeat_interleave(count)
            ids = names["input_ids"].repeat(count, 1)  # every caption after every picture
            read = model(input_ids=ids, past_key_values=seen.past_key_values).logits[:, :-1]
            logits = torch.cat([seen.logits[:, -1:].repeat_interleave(count, dim=0), read], dim=1)
            known = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].view(count, count, -1)
        lengths = names["attention_mask"].sum(-1)
        likely = (known * names["attention_mask"]).sum(-1)  # [picture, caption], in nats
        found["loss"] += (-likely.diagonal() / lengths).tolist()
        for axis, name in ((1, "own_name"), (0, "own_picture")):
            found[name] += (likely.argmax(axis) == torch.arange(count)).tolist()
    write_json(folder / "choices.json", found)


def draw_chat(root: Path, exported: Path) -> None:
    """Captions held-out pictures with the exported model in LLaMA-Factory's chat, and draws them in ``chat.png``."""
    from llamafactory.chat import ChatModel

    talk = ChatModel({"model_name_or_path": str(exported), "template": "llava_plain", "infer_dtype": "float32"})
    figure = new_figure(11.0, 4.0)
    for axes, row in zip(figure.subplots(2, 8).flat, read_json(root / "data/heldout.json"), strict=False):
        image = str(root / "data" / row["images"][0])
        turn = [{"role": "user", "content": row["prompt"]}]
        response = talk.chat(turn, images=[image], do_sample=False, max_new_tokens=12)[0].response_text
        axes.imshow(Image.open(image))
        axes.set_axis_off()
        captions = (row["response"], f"→ {response.partition(chr(10))[0]}")
        axes.set_title("\n".join(fill(text, 24) for text in captions), fontsize=6)
    save_figure(figure, exported / "chat.png")


def write_page(root: Path) -> Path:
    """Writes ``real.md`` from all finished runs, and returns its path."""
    scores = {path.parent.name: ScoreFile.load(path) for path in root.glob("scores/*/heads.json")}
    heads = {name: score.ranked("head") for name, score in scores.items()}
    order, before = list(ScoreFile.load(root / "selection/worst/hera/heads.json").ranked("head")), scores["before"]
    groups = worst, top, _ = order[:5], order[::-1][:5], order
    lines = ["# HeRA on SmolLM2-135M-Instruct", "", "![All heads](selection/worst/hera/heads.png)", ""]
    lines += [f"Worst: {' '.join(map(str, worst))}. Top: {' '.join(map(str, top))}.", ""]
    known = read_json(root / "knowledge/knowledge.json")
    rows: list[Any] = [(name, f"{share:.2f}") for name, share in known.items()]
    lines += _table("nearest stamps", "share from the same folder", rows=rows)
    rows = []
    for title, names in _ORDERS.items():
        one, other = (heads[name] for name in names)
        same = [len({*list(one)[end]} & {*list(other)[end]}) for end in (slice(5), slice(-5, None))]
        rho = spearmanr([one[head] for head in order], [other[head] for head in order]).statistic
        rows.append((title, f"{rho:.2f}", *map(str, same)))
    lines += _table("order of the heads over", "rank correlation", "worst five in common", "top five", rows=rows)
    measured: dict[str, list[Any]] = {}
    for path in root.glob("choices/*/choices.json"):
        of_run, choices = heads.get(name := path.parent.name, {}), read_json(path)
        if of_run:
            of_groups = [[of_run[head] for head in group] for group in groups]
            measured[name] = [*map(np.mean, of_groups), *(np.array(choices[kind], float) for kind in _MEASURED)]
    rows, differences = [("before", "", *(_interval([value]) for value in measured["before"]))], []
    for method in METHODS:
        runs = {seed: run for seed in range(_MOST_SEEDS) if (run := measured.get(f"{method}-s{seed}"))}
        if runs:
            rows.append((method, str(len(runs)), *map(_interval, zip(*runs.values(), strict=True))))
        _, few, n = method.partition("_few")
        baselines = {seed: measured.get(f"sft{few}{n}-s{seed}") for seed in runs}
        pairs = [map(np.subtract, runs[seed], baseline) for seed, baseline in baselines.items() if baseline]
        if pairs and not method.startswith("sft"):
            cells = [_interval(column, "+") for column in zip(*pairs, strict=True)]
            differences.append((method, str(len(pairs)), *cells))
    titles = ("seeds", "worst-5", "top-5", "all", *_MEASURED.values())
    lines.append(_NOTE.format(before.provenance["samples"], before.chance))
    lines += [*_table("", *titles, rows=rows), *_table("minus SFT on the same pictures", *titles, rows=differences)]
    if (root / "exported").is_dir():
        lines += ["![Held-out pictures with the exported model's captions](exported/chat.png)", ""]
        lines += ["![The nearest pictures for one head](gallery/gallery.png)", ""]
        lines += ["[The heads before and after, with their nearest pictures](report/report.html)"]
    write_text(root / "real.md", "\n".join(lines) + "\n")
    return root / "real.md"


def _table(*titles: str, rows: Iterable[tuple[str, ...]]) -> list[str]:
    rule = ("---", *("--:" for _ in titles[1:]))
    return [*(f"| {' | '.join(row)} |" for row in (titles, rule, *rows)), ""]


def _interval(runs: Sequence[Any], sign: str = "") -> str:
    """Formats a mean with its 95% interval (Student's t) over the runs or, for one run, over the pictures."""
    values = np.ravel(runs[0]) if len(runs) == 1 else [np.mean(run) for run in runs]
    mean = f"{np.mean(values):{sign}.3f}"
    if len(values) == 1:
        return mean
    half = t.ppf(0.975, len(values) - 1) * sem(values)
    return f"{mean} [{np.mean(values) - half:{sign}.3f}, {np.mean(values) + half:{sign}.3f}]"
