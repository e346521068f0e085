"""The rows of the paper's ablation (table 1), VIRAL and CMAR: the stage-2 recipe with other ``hera_*`` keys."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from llamafactory_hera.backbones.table import TEACHER, Backbone

from .text import Recipe

FOLDER = "ablations"
#: The two LLMs of the paper's table.
MODELS = ("qwen2_5_3b", "qwen3_4b")
#: Lines of recipes/README.md between which the generator writes its table.
MARKS = ("<!-- ablations: generated -->", "<!-- end of ablations -->")

_LAYER = {"hera_granularity": "layer"}
_CONTRASTIVE = ("hera_weight", "hera_k", "hera_temperature", "hera_memory")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: In the file's name.
        title: What is aligned with what.
        keys: Keys that say so; ``hera_heads`` is a number where the paper's first so many heads are meant.
        both: The objective is part of stage 1, too.
        paper: The paper's vision average on the two LLMs; empty where its table has no such row.
        note: A sentence of the header.
    """

    name: str
    title: str
    keys: dict[str, Any]
    both: bool = True
    paper: tuple[str, ...] = ("", "")
    note: str = ""

    def values(self, model: Backbone) -> dict[str, Any]:
        """The keys with the model's heads written out."""
        count = self.keys.get("hera_heads")
        if not isinstance(count, int):
            return self.keys
        return self.keys | {"hera_heads": ",".join(model.heads.split(",")[:count])}


def _auto(strategy: str, m: int) -> dict[str, Any]:
    return {"hera_heads": "auto", "hera_select": strategy, "hera_select_m": m}


_OURS = "The paper names this row and does not say how features are matched: docs/method.md says what is done here."
_TEN = "The run warns: ten heads wrecked Qwen2.5-3B in the paper."

ROWS = (
    Row(
        "feature_layer_middle",
        "features of the middle layer are matched",
        {"hera_objective": "feature", **_LAYER, "hera_layers": "middle"},
        paper=("50.1", "53.4"),
        note=_OURS,
    ),
    Row(
        "feature_head_worst5",
        "features of the 5 least aligned heads are matched",
        {"hera_objective": "feature", "hera_heads": 5},
        paper=("51.6", "55.9"),
        note=_OURS,
    ),
    Row(
        "contrastive_layer_middle",
        "the contrastive loss on the middle layer",
        {**_LAYER, "hera_layers": "middle"},
        paper=("51.1", "57.2"),
    ),
    Row(
        "contrastive_layer_worst5",
        "the contrastive loss on the 5 least aligned layers",
        {**_LAYER, "hera_layers": "auto", "hera_select": "worst", "hera_select_m": 5},
        paper=("51.7", "52.1"),
    ),
    Row("head_random5", "5 random heads", _auto("random", 5), paper=("49.7", "56.6")),
    Row("head_top5", "the 5 most aligned heads", _auto("top", 5), paper=("50.2", "56.3")),
    Row("head_worst1", "the least aligned head", {"hera_heads": 1}, paper=("51.2", "57.0")),
    Row("head_worst3", "the 3 least aligned heads", {"hera_heads": 3}, paper=("51.0", "57.0")),
    Row("head_worst10", "the 10 least aligned heads", _auto("worst", 10), paper=("38.9", "56.3"), note=_TEN),
    Row(
        "viral",
        "VIRAL (arXiv 2509.07979), visual tokens of the middle layer and the teacher's patches",
        {"hera_objective": "viral", **_LAYER, "hera_layers": "middle", "hera_weight": 0.5},
        both=False,
    ),
    Row(
        "cmar",
        "CMAR, 1 - CKA of the penultimate layer and the teacher",
        {"hera_objective": "cka", **_LAYER, "hera_layers": "penultimate", "hera_weight": 0.01},
        note="That it has HeRA's weight and is part of both stages is this project's choice.",
    ),
)


def ablations(model: Backbone, hera: Recipe) -> Iterator[Recipe]:
    """The rows for one LLM.

    Args:
        model: The LLM.
        hera: Its stage-2 recipe, from which a row differs in the ``hera_*`` keys and its folders alone.
    """
    for row in ROWS:
        values = row.values(model)
        stage_one = f"saves/{model.key}/pretrain_{row.name if row.both else 'sft'}"
        changed = {"model_name_or_path": stage_one, "output_dir": f"saves/{model.key}/{row.name}"}
        sections = [
            (name, _hera(values, keys) if name == "hera" else {k: changed.get(k, v) for k, v in keys.items()})
            for name, keys in hera.sections
        ]
        needs = [(f"{stage_one}/", "the output of stage 1, see below"), *hera.needs[1:]]
        title = f"{model.title}, LLaVA stage 2, ablation: {row.title}."
        name = f"{FOLDER}/{model.key}_{row.name}"
        notes = f"{_stage_one(model, row, values, stage_one)} {row.note}".rstrip()
        yield replace(hera, name=name, title=title, needs=needs, sections=sections, notes=notes)


def _hera(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    if "hera_objective" in values:  # nothing is compared with candidates, by a temperature
        return {**values, "hera_teacher": TEACHER, "hera_weight": values.get("hera_weight", keys["hera_weight"])}
    return {**values, "hera_teacher": TEACHER, **{key: keys[key] for key in _CONTRASTIVE}}


def _stage_one(model: Backbone, row: Row, values: dict[str, Any], folder: str) -> str:
    command = f"llamafactory-cli train recipes/{model.key}_pretrain.yaml output_dir={folder}"
    if not row.both:
        return f"Stage 1 goes without it: `{command} stage=sft`."
    others = {key: value for key, value in values.items() if key != "hera_weight"}
    if "hera_heads" not in others:
        others["hera_heads"] = "null"
    if "hera_objective" in others:
        others["hera_memory"] = 0
    text = f"Stage 1 with the same alignment: `{command} {' '.join(f'{k}={v}' for k, v in others.items())}`."
    if values.get("hera_heads") == "auto":
        text += f" For the heads that it selected append hera_heads={folder}/hera/heads.json to the command above."
    if values.get("hera_layers") == "auto":
        text += f" For the layers that it selected append hera_layers={folder}/hera/layers.json to the command above."
    return text


def index() -> str:
    """The table of recipes/README.md."""
    lines = ["| Row | Qwen2.5-3B | Qwen3-4B | the paper's vision average |", "| --- | --- | --- | --- |"]
    rows = [
        (
            "without HeRA in either stage: with `model_name_or_path=saves/NAME/pretrain_sft`",
            [f"{key}_sft" for key in MODELS],
            "50.5 / 56.3",
        ),
        ("HeRA: the contrastive loss on the 5 least aligned heads", [f"{key}_hera" for key in MODELS], "52.9 / 58.5"),
    ]
    rows += [
        (row.title, [f"{FOLDER}/{key}_{row.name}" for key in MODELS], " / ".join(row.paper) if row.paper[0] else "–")
        for row in ROWS
    ]
    for text, names, paper in rows:
        links = " | ".join(f"[{name.rpartition('/')[2]}]({name}.yaml)" for name in names)
        lines.append(f"| {text} | {links} | {paper} |")
    return "\n".join(lines)
