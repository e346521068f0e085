"""The rows of the paper's tables 1 and 4, as recipes that change the ``hera_*`` keys of the two stages."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llamafactory_hera.backbones.table import TEACHER, Backbone

from .sizes import SIZES
from .text import Recipe

FOLDER = "ablations"
#: The two LLMs of the paper's table 1, and the LLM of table 4.
MODELS, RIVALRY = ("qwen2_5_3b", "qwen3_4b"), "qwen3_8b"
#: The generator writes its tables between these lines of recipes/README.md.
MARKS = ("<!-- ablations: generated -->", "<!-- end of ablations -->")

#: The paper selects heads on captions from GranD (recipes/data/README.md).
_GRAND = {"hera_select_dataset": "grand_captions"}
_LAYER = {"hera_granularity": "layer"}
_CONTRASTIVE = ("hera_weight", "hera_k", "hera_temperature", "hera_memory")


@dataclass(frozen=True)
class Row:
    """A row of table 1; both stages use its alignment.

    Attributes:
        name: The row's part of the file name.
        title: A description for the header and the table.
        keys: The changed keys; an integer ``hera_heads`` says how many of the paper's heads to use.
        paper: The paper's vision average on the two LLMs.
        note: A sentence for the header.
    """

    name: str
    title: str
    keys: dict[str, Any]
    paper: tuple[str, str]
    note: str = ""

    def values(self, model: Backbone) -> dict[str, Any]:
        """Returns the keys with the names of the model's heads."""
        count = self.keys.get("hera_heads")
        if not isinstance(count, int):
            return self.keys
        return self.keys | {"hera_heads": ",".join(model.heads.split(",")[:count])}


def _auto(strategy: str, m: int) -> dict[str, Any]:
    return {"hera_heads": "auto", "hera_select": strategy, "hera_select_m": m, **_GRAND}


_FEATURE = (
    "The objective matches visual tokens to the teacher's patches, as in VIRAL and REPA (paper, section 4.2). The "
    "paper leaves some choices open, mainly the objective's projector; docs/rivals.md lists them."
)
_VIRAL = (
    "VIRAL reads hidden_states[n / 2]. The teacher and the weight come from HeRA's paper; VIRAL's code uses "
    "facebook/dinov2-base. With LoRA, VIRAL trains the projector at 2e-5; LLaMA-Factory has only one learning rate."
)
_CMAR = (
    "The paper states neither the weight nor the stages. The weight of 0.1 comes from a reproduction; HeRA's weight "
    "is 0.01. Alignment in both stages is this project's choice."
)
_ROSS = (
    "The data are the 665k instructions of HeRA's paper; ROSS's code uses 737k. The memory figures above exclude the "
    "denoiser (64 million fp32 parameters with AdamW states) and its activations."
)
_JARVIS = "Stage 2 is plain fine-tuning. hera_visual_attention: two_way uses JARVIS's attention; see docs/rivals.md."
_JARVIS_TWO = "Only stage 1 uses JARVIS."
_GRAM = (
    "LaVer compares the student with a moving average of itself and adds a loss on masked tokens; here, the teacher "
    "is a frozen vision encoder, and no token is masked (docs/rivals.md). The layer and the weight are LaVer's."
)
#: The linear layers of a decoder layer.
_LINEAR = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
_MIDDLE = (
    "arXiv 2606.03871 trains only intermediate layers; the middle third is this project's choice. LLaMA-Factory's "
    "finetuning_type: freeze trains only the first or the last layers, so this recipe trains adapters on the middle "
    "layers."
)
_VAE_NEED = (
    "an AutoencoderKL. ROSS uses FLUX.1-dev's; accept its license, then run: hf download "
    "black-forest-labs/FLUX.1-dev --include 'vae/*' --local-dir models/flux"
)
VAE = "models/flux/vae"
_TEN = "The run warns that the paper's Qwen2.5-3B collapsed with ten heads."

ROWS = (
    Row(
        "feature_layer_middle",
        "feature matching of visual tokens in the middle layer",
        {"hera_objective": "feature", **_LAYER, "hera_layers": "middle"},
        paper=("50.1", "53.4"),
        note=_FEATURE,
    ),
    Row(
        "feature_head_worst5",
        "feature matching of visual tokens in the 5 least aligned heads",
        {"hera_objective": "feature", "hera_heads": 5},
        paper=("51.6", "55.9"),
        note=_FEATURE,
    ),
    Row(
        "contrastive_layer_middle",
        "contrastive loss on the middle layer",
        {**_LAYER, "hera_layers": "middle"},
        paper=("51.1", "57.2"),
    ),
    Row(
        "contrastive_layer_worst5",
        "contrastive loss on the 5 least aligned layers",
        {**_LAYER, "hera_layers": "auto", "hera_select": "worst", "hera_select_m": 5, **_GRAND},
        paper=("51.7", "52.1"),
    ),
    Row("head_random5", "contrastive loss on 5 random heads", _auto("random", 5), paper=("49.7", "56.6")),
    Row("head_top5", "contrastive loss on the 5 most aligned heads", _auto("top", 5), paper=("50.2", "56.3")),
    Row("head_worst1", "contrastive loss on the least aligned head", {"hera_heads": 1}, paper=("51.2", "57.0")),
    Row("head_worst3", "contrastive loss on the 3 least aligned heads", {"hera_heads": 3}, paper=("51.0", "57.0")),
    Row(
        "head_worst10",
        "contrastive loss on the 10 least aligned heads",
        _auto("worst", 10),
        paper=("38.9", "56.3"),
        note=_TEN,
    ),
)


def ablations(model: Backbone, hera: Recipe) -> Iterator[Recipe]:
    """Makes the rows of table 1 for an LLM.

    Args:
        model: The LLM.
        hera: Its stage-2 recipe; a row differs from it only in the ``hera_*`` keys and the folders.
    """
    for row in ROWS:
        first = row.values(model)
        stage_one = f"saves/{model.key}/pretrain_{row.name}"
        second = dict(first)
        key = "hera_layers" if "hera_layers" in first else "hera_heads"
        if first[key] == "auto":
            # Stage 2 reuses stage 1's selection, because stage 1 does not change the language model.
            path = f"{stage_one}/hera/{key.removeprefix('hera_')}.json"
            dropped = {"hera_select", *_GRAND} | ({"hera_select_m"} if first["hera_select_m"] == 5 else set())
            second = {k: path if k == key else v for k, v in first.items() if k not in dropped}
        keys = _CONTRASTIVE if "hera_objective" not in first else ("hera_weight",)
        title = f"{model.title}, LLaVA stage 2, ablation: {row.title}."
        notes = f"{_stage_one(model, first, stage_one)} {row.note}".rstrip()
        yield _changed(hera, model, row.name, title, stage_one, second, keys, notes)


def rivals(model: Backbone, pretrain: Recipe, hera: Recipe, lora: Recipe) -> Iterator[Recipe]:
    """Makes the rows of table 4: ROSS, VIRAL, JARVIS and CMAR as in their sources, and all but CMAR also with LoRA.

    Two rows are not in the paper: LaVer's Gram loss, and fine-tuning of the middle layers.

    Args:
        model: The LLM.
        pretrain: The recipe of its stage 1 with HeRA.
        hera: The recipe of its stage 2 with HeRA.
        lora: The recipe of its stage 2 with HeRA and LoRA.
    """
    saves = f"saves/{model.key}"
    plain = f"Run stage 1 without an alignment loss: `llamafactory-cli train recipes/{model.key}_pretrain.yaml"
    plain += f" output_dir={saves}/pretrain_sft stage=sft`."
    layers = SIZES[model.key].layers
    viral = {"hera_objective": "viral", **_LAYER, "hera_layers": f"L{layers // 2 - 1}", "hera_weight": 0.5}
    cmar = {"hera_objective": "cka", **_LAYER, "hera_layers": "penultimate", "hera_weight": 0.1}
    cmar["hera_accumulate"] = "gradcache"
    ross = {"hera_objective": "ross", **_LAYER, "hera_layers": "final", "hera_weight": 1.0, "hera_teacher": VAE}
    jarvis = {"hera_objective": "jarvis", **_LAYER, "hera_layers": f"L{layers // 4 - 1}", "hera_weight": 1.0}
    stages = {
        "ross_pretrain": (pretrain, "ROSS", f"models/{model.key}", {**ross, "hera_objective_lr": "1.0e-4"}, _ROSS),
        "jarvis_pretrain": (pretrain, "JARVIS", f"models/{model.key}", jarvis, _JARVIS),
    }
    for suffix, recipe in (("", hera), ("_lora", lora)):
        second = {**ross, "hera_objective_from": f"{saves}/ross_pretrain"}
        stages[f"ross{suffix}"] = (recipe, "ROSS", f"{saves}/ross_pretrain", second, _ROSS)
        stages[f"viral{suffix}"] = (recipe, "VIRAL", f"{saves}/pretrain_sft", viral, f"{plain} {_VIRAL}")
    gram = {"hera_objective": "gram", **_LAYER, "hera_layers": "final", "hera_weight": 1.0}
    stages["gram"] = (hera, "the Gram loss of LaVer", f"{saves}/pretrain_sft", gram, f"{plain} {_GRAM}")
    stages["cmar"] = (hera, "CMAR", f"{saves}/pretrain_cmar", cmar, _CMAR)
    for name, (recipe, title, start, keys, notes) in stages.items():
        stage = "stage 1" if recipe is pretrain else "stage 2 (LoRA)" if recipe is lora else "stage 2"
        if name == "cmar":
            notes = f"{_stage_one(model, keys, start)} {notes}"
        yield _changed(recipe, model, name, f"{model.title}, LLaVA {stage} with {title}.", start, keys, (), notes)
    for suffix, recipe in (("", hera), ("_lora", lora)):
        name, start = f"jarvis{suffix}", f"{saves}/jarvis_pretrain"
        stage = f"stage 2{' (LoRA)' if suffix else ''}"
        title = f"{model.title}, LLaVA {stage} without an alignment loss, after stage 1 with JARVIS."
        after = recipe.without_hera(f"{FOLDER}/{model.key}_{name}", title, f"{saves}/{name}", _JARVIS_TWO)
        yield _starting(after, start)
    yield _starting(_middle_layers(model, lora, plain), f"{saves}/pretrain_sft")


def _middle_layers(model: Backbone, lora: Recipe, stage_one: str) -> Recipe:
    """Makes the LoRA baseline that trains only the middle third of the layers (arXiv 2606.03871)."""
    first, end = SIZES[model.key].layers // 3, 2 * SIZES[model.key].layers // 3
    title = (
        f"{model.title}, LLaVA stage 2 (LoRA) without an alignment loss, on layers {first} to {end - 1} only (arXiv "
    )
    title += "2606.03871)."
    name = "sft_middle_lora"
    recipe = lora.without_hera(
        f"{FOLDER}/{model.key}_{name}", title, f"saves/{model.key}/{name}", f"{stage_one} {_MIDDLE}"
    )
    targets = ", ".join(f"layers.{layer}.{part}" for layer in range(first, end) for part in _LINEAR)
    return recipe.changed(lora_target=targets)


def _starting(recipe: Recipe, start: str) -> Recipe:
    """Replaces the model that the recipe starts from."""
    needs = [(f"{start}/", "the output of stage 1"), *recipe.needs[1:]]
    return replace(recipe.changed(model_name_or_path=start), needs=needs)


def _changed(
    recipe: Recipe,
    model: Backbone,
    name: str,
    title: str,
    start: str,
    keys: dict[str, Any],
    kept: Iterable[str],
    notes: str,
) -> Recipe:
    """Replaces the ``hera_*`` keys except ``kept``, and the folders."""
    section = dict(recipe.sections)["hera"]
    teacher = keys.get("hera_teacher", TEACHER)
    hera = {**keys, "hera_teacher": teacher, **{key: section[key] for key in kept if key not in keys}}
    output = f"saves/{model.key}/{name}"
    sections = [
        (part, hera if part == "hera" else {k: output if k == "output_dir" else v for k, v in each.items()})
        for part, each in recipe.sections
    ]
    needs = [need for need in recipe.needs if need[0] != TEACHER or teacher == TEACHER]
    needs += [(f"{VAE}/", _VAE_NEED)] if teacher == VAE else []
    changed = replace(
        recipe, name=f"{FOLDER}/{model.key}_{name}", title=title, needs=needs, sections=sections, notes=notes
    )
    return changed if start == recipe.keys["model_name_or_path"] else _starting(changed, start)


def _stage_one(model: Backbone, keys: dict[str, Any], folder: str) -> str:
    """Returns a sentence with the command of stage 1, which has no recipe."""
    others = {"hera_heads": "null", **keys}
    if "hera_objective" in others:
        others["hera_memory"] = 0
    settings = " ".join(f"{key}={value}" for key, value in others.items())
    command = f"llamafactory-cli train recipes/{model.key}_pretrain.yaml output_dir={folder} {settings}"
    return f"Run stage 1 with the same alignment: `{command}`."


def index() -> str:
    """Returns the tables for recipes/README.md."""
    averages = [f"paper's vision average, {name}" for name in ("Qwen2.5-3B", "Qwen3-4B")]
    lines = [f"| Method | Qwen2.5-3B | Qwen3-4B | {' | '.join(averages)} |", "| --- | --- | --- | --: | --: |"]
    rows = [
        (
            "no HeRA in either stage; append `model_name_or_path=saves/NAME/pretrain_sft`",
            [f"{key}_sft" for key in MODELS],
            "50.5 | 56.3",
        ),
        ("HeRA: contrastive loss on the 5 least aligned heads", [f"{key}_hera" for key in MODELS], "52.9 | 58.5"),
    ]
    rows += [(row.title, [f"{FOLDER}/{key}_{row.name}" for key in MODELS], " | ".join(row.paper)) for row in ROWS]
    lines += [f"| {text} | {' | '.join(map(_link, names))} | {paper} |" for text, names, paper in rows]
    lines += ["", "These recipes run the methods of table 4 on Qwen3-8B:", ""]
    lines += [
        "| Method | Stage 1 | Stage 2 | Stage 2, LoRA | paper's vision average |",
        "| --- | --- | --- | --- | --: |",
    ]
    first = {"ROSS": "ross_pretrain", "JARVIS": "jarvis_pretrain"}
    for title, paper in (("ROSS", "56.2"), ("VIRAL", "54.2"), ("JARVIS", "58.7"), ("CMAR", "56.9")):
        name = f"{FOLDER}/{RIVALRY}_{title.lower()}"
        one = _link(f"{FOLDER}/{RIVALRY}_{first[title]}") if title in first else "command in stage 2's header"
        by_lora = "–" if title == "CMAR" else _link(f"{name}_lora")
        lines.append(f"| {title} | {one} | {_link(name)} | {by_lora} | {paper} |")
    none, hera = _link(f"{RIVALRY}_sft"), _link(f"{RIVALRY}_hera")
    lines.append(f"| HeRA | {_link(f'{RIVALRY}_pretrain')} | {hera} | {_link(f'{RIVALRY}_hera_lora')} | 59.5 |")
    lines.append(f"| none | command in stage 2's header | {none} | – | 55.9 |")
    gram, middle = _link(f"{FOLDER}/{RIVALRY}_gram"), _link(f"{FOLDER}/{RIVALRY}_sft_middle_lora")
    lines += ["", "Two more recipes are not in the paper. Their headers contain the stage 1 command:", ""]
    lines += ["| Method | Stage 2 |", "| --- | --- |", f"| the Gram loss of LaVer | {gram} |"]
    lines += [f"| no alignment loss, LoRA adapters on the middle third of the layers | {middle} |"]
    return "\n".join(lines)


def _link(name: str) -> str:
    return f"[{name.rpartition('/')[2]}]({name}.yaml)"
