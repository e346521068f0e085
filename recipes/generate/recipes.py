"""The recipes, made of the table of backbones.

Hyper-parameters are LLaVA-1.5's, which the paper uses (arXiv 2606.23885): stage 1 with global batch 256 and learning
rate 1e-3 on the projector, stage 2 with 128 and 2e-5 (LoRA 2e-4); cosine, 3 % warm-up, one epoch, bf16. Learning rates
of finished VLMs are this project's choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llamafactory_hera.backbones.table import LANGUAGE_MODELS, NATIVE_MODELS, TEACHER, VISION_MODEL, Backbone

from . import sections
from .ablations import MARKS, RIVALRY, ablations, index, rivals
from .ablations import MODELS as ABLATED
from .memory import Work, spread
from .sizes import SIZES, Sizes
from .text import Recipe, render

GPUS = (1, 8, 32)
#: GPUs that the values of a recipe are for; the other rows stand in its header.
DEFAULT_GPUS = 8

#: Parameters of SigLIP2 SO400M's vision half without its pooling head, and its width.
N_VISION, VISION_WIDTH = 412_987_248, 1152
CAPTION_TOKENS = 832  # 729 of the image and a short caption
CUTOFF, LONG_CUTOFF = 2048, 4096
LORA_RANK = 128
QLORA_RANK = 16
QLORA_CARD, QLORA_BATCH = 24, 32

_TEACHER_NEED = (TEACHER, "the teacher: fetched from the hub by the first run, or a local folder in hera_teacher")
_PRETRAIN_NEED = ("recipes/data/llava_pretrain/", "558k captions and their images: recipes/data/README.md")
_INSTRUCT_NEED = ("recipes/data/llava_instruct/", "665k instructions and their images: recipes/data/README.md")
_QUANT_NEED = ("bitsandbytes", 'pip install "llamafactory-hera[quant]"')


def n_projector(sizes: Sizes) -> int:
    """Parameters of the two-layer projector into an LLM."""
    return VISION_WIDTH * sizes.hidden + sizes.hidden**2 + 2 * sizes.hidden


def _pretrain(model: Backbone) -> Recipe:
    sizes = SIZES[model.key]
    work = Work(sizes, sizes.n_parameters + N_VISION, n_projector(sizes), CAPTION_TOKENS, 256)
    plans = [spread(work, gpus) for gpus in GPUS]
    batches = plans[GPUS.index(DEFAULT_GPUS)]
    build = f"llamafactory-hera build --language-model {model.checkpoint} --vision-model {VISION_MODEL}"
    build += " --image-aspect-ratio pad"
    return Recipe(
        f"{model.key}_pretrain",
        f"{model.title}, LLaVA stage 1 with HeRA: the projector learns from captions, all else is frozen.",
        [(f"models/{model.key}/", f"{build} --output models/{model.key}"), _PRETRAIN_NEED, _TEACHER_NEED],
        work,
        plans,
        [
            sections.model(f"models/{model.key}"),
            sections.method(sections.PROJECTOR),
            sections.hera(model.heads, batches),
            sections.data("llava_pretrain", "llava_plain", CUTOFF),
            sections.output(f"{model.key}/pretrain"),
            sections.train(batches, "1.0e-3"),
        ],
    )


def _stage_two(model: Backbone, kind: Literal["hera", "hera_lora"]) -> Recipe:
    sizes = SIZES[model.key]
    if kind == "hera_lora":
        trained = sizes.lora(LORA_RANK) + n_projector(sizes)
        work = Work(sizes, sizes.n_parameters + N_VISION, trained, CUTOFF, 128)
        what, rate = "with HeRA by LoRA: adapters on the LLM, and the projector.", "2.0e-4"
        keys = sections.lora(LORA_RANK, "multi_modal_projector")
    else:
        work = Work(sizes, N_VISION, sizes.n_parameters + n_projector(sizes), CUTOFF, 128, zero3=True)
        what, rate = "with HeRA: LLM and projector learn from instructions.", "2.0e-5"
        keys = sections.FULL
    plans = [spread(work, gpus) for gpus in GPUS]
    batches = plans[GPUS.index(DEFAULT_GPUS)]
    stage_one = (f"saves/{model.key}/pretrain/", f"the output of {model.key}_pretrain.yaml")
    return Recipe(
        f"{model.key}_{kind}",
        f"{model.title}, LLaVA stage 2 {what}",
        [stage_one, _INSTRUCT_NEED, _TEACHER_NEED],
        work,
        plans,
        [
            sections.model(f"saves/{model.key}/pretrain"),
            sections.method(keys),
            sections.hera(model.heads, batches),
            sections.data("llava_instruct", model.template, CUTOFF),
            sections.output(f"{model.key}/{kind}"),
            sections.train(batches, rate, train_sampling_strategy="group_by_length"),
        ],
    )


def _baseline(model: Backbone) -> Recipe:
    hera = _stage_two(model, "hera")
    stage_one = f"saves/{model.key}/pretrain_sft"
    notes = (
        f"It starts from the same stage 1 as {hera.name}.yaml. For a baseline without HeRA in either stage run "
        f"`llamafactory-cli train recipes/{model.key}_pretrain.yaml stage=sft output_dir={stage_one}` first, and "
        f"append `model_name_or_path={stage_one}` to the command above."
    )
    title = f"{model.title}, LLaVA stage 2 without HeRA: the baseline of {hera.name}.yaml."
    return hera.without_hera(f"{model.key}_sft", title, f"saves/{model.key}/sft", notes)


@dataclass(frozen=True)
class _NativeKind:
    what: str
    rate: str
    rank: int = 0
    four_bit: bool = False


_NATIVE_KINDS = {
    "hera": _NativeKind("fine-tuned with HeRA: LLM and projector.", "1.0e-5"),
    "hera_lora": _NativeKind(
        "fine-tuned with HeRA by LoRA: adapters on the LLM, and the projector.", "1.0e-4", LORA_RANK
    ),
    "hera_qlora": _NativeKind(
        "fine-tuned with HeRA by QLoRA on one 24 GB card: adapters on the LLM in 4 bits.", "1.0e-4", QLORA_RANK, True
    ),
}


def _native(model: Backbone, name: str) -> Recipe:
    kind, sizes = _NATIVE_KINDS[name], SIZES[model.key]
    cutoff = LONG_CUTOFF if sizes.image_tokens > CUTOFF // 2 else CUTOFF
    # the vision half is small beside the text decoder, and is counted with it
    if kind.four_bit:
        trained = sizes.lora(kind.rank)
        work = Work(sizes, sizes.n_parameters, trained, cutoff, QLORA_BATCH, card=QLORA_CARD, four_bit=True)
    elif kind.rank:
        work = Work(sizes, sizes.n_parameters, sizes.lora(kind.rank), cutoff, 128)
    else:
        work = Work(sizes, 0, sizes.n_parameters, cutoff, 128, zero3=True)
    plans = [spread(work, gpus) for gpus in GPUS]
    batches = plans[0 if kind.four_bit else GPUS.index(DEFAULT_GPUS)]
    keys = sections.lora(kind.rank, None if kind.four_bit else sizes.projector) if kind.rank else sections.FULL
    checkpoint = (model.checkpoint, "the model: fetched from the hub, or a local folder in model_name_or_path")
    return Recipe(
        f"{model.key}_{name}",
        f"{model.title}, {kind.what}",
        [checkpoint, _INSTRUCT_NEED, _TEACHER_NEED, *([_QUANT_NEED] if kind.four_bit else [])],
        work,
        plans,
        [
            sections.model(model.checkpoint, **(sections.QUANTISED if kind.four_bit else {})),
            sections.method(keys),
            sections.hera("auto", batches, hera_select_mode="mllm"),
            sections.data("llava_instruct", model.template, cutoff),
            sections.output(f"{model.key}/{name}"),
            sections.train(batches, kind.rate),
        ],
    )


def all_recipes() -> Iterator[Recipe]:
    """Every generated recipe."""
    for model in LANGUAGE_MODELS.values():
        yield _pretrain(model)
        yield _stage_two(model, "hera")
        yield _stage_two(model, "hera_lora")
        yield _baseline(model)
    for native in NATIVE_MODELS.values():
        yield _native(native, "hera")
        yield _native(native, "hera_lora")
    yield _native(NATIVE_MODELS["qwen2_5_vl_7b"], "hera_qlora")
    for key in ABLATED:
        yield from ablations(LANGUAGE_MODELS[key], _stage_two(LANGUAGE_MODELS[key], "hera"))
    model = LANGUAGE_MODELS[RIVALRY]
    yield from rivals(model, _pretrain(model), _stage_two(model, "hera"), _stage_two(model, "hera_lora"))


def write_recipes(folder: Path) -> list[Path]:
    """Writes every recipe into ``folder``; returns the files."""
    files = []
    for recipe in all_recipes():
        files.append(folder / f"{recipe.name}.yaml")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(render(recipe), encoding="utf-8")
    return files


def write_index(page: Path) -> None:
    """Writes the table of ablations into ``recipes/README.md``, between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{index()}\n{MARKS[1]}{after}", encoding="utf-8")
