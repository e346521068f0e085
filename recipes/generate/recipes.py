"""The recipes of all backbones in the table.

As in the paper (arXiv 2606.23885), the hyperparameters are LLaVA-1.5's. Stage 1 trains the projector with a global
batch of 256 and a learning rate of 1e-3. Stage 2 uses a batch of 128 and a rate of 2e-5 (2e-4 with LoRA). Both use a
cosine schedule, 3% warm-up, one epoch and bf16. This project chose the learning rates for existing VLMs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
#: A recipe's keys are set for this number of GPUs; the header also lists the settings for other numbers.
DEFAULT_GPUS = 8

#: The parameter count (without the pooling head) and the width of SigLIP2 SO400M's vision encoder.
N_VISION, VISION_WIDTH = 412_987_248, 1152
CAPTION_TOKENS = 832  # 729 image tokens and a short caption
CUTOFF, LONG_CUTOFF = 2048, 4096
LORA_RANK = 128
QLORA_RANK = 16
QLORA_CARD, QLORA_BATCH = 24, 32

_TEACHER_NEED = (TEACHER, "the teacher; the first run downloads it unless hera_teacher is a local folder")
_PRETRAIN_NEED = ("recipes/data/llava_pretrain/", "558k captioned images; see recipes/data/README.md")
_INSTRUCT_NEED = ("recipes/data/llava_instruct/", "665k instructions with images; see recipes/data/README.md")
_FINEVISION_NEED = ("recipes/data/finevision/", "83k FineVision samples with images; see recipes/data/README.md")
_QUANT_NEED = ("bitsandbytes", "pip install bitsandbytes")


def n_projector(sizes: Sizes) -> int:
    """Counts the parameters of the two-layer projector into an LLM."""
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
        f"{model.title}, LLaVA stage 1 with HeRA: the projector learns from captions; all other parts are frozen.",
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
        what, rate = "with LoRA and HeRA: adapters on the LLM, and full training of the projector.", "2.0e-4"
        keys = sections.lora(LORA_RANK, "multi_modal_projector")
    else:
        work = Work(sizes, N_VISION, sizes.n_parameters + n_projector(sizes), CUTOFF, 128, zero3=True)
        what, rate = "with HeRA: the LLM and the projector learn from instructions.", "2.0e-5"
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
        f"This run starts from the same stage 1 as {hera.name}.yaml. For a baseline without HeRA in either stage, "
        f"first run `llamafactory-cli train recipes/{model.key}_pretrain.yaml stage=sft output_dir={stage_one}`, then "
        f"append `model_name_or_path={stage_one}` to the command above."
    )
    title = f"{model.title}, LLaVA stage 2 without HeRA: the baseline for {hera.name}.yaml."
    return hera.without_hera(f"{model.key}_sft", title, f"saves/{model.key}/sft", notes)


@dataclass(frozen=True)
class _NativeKind:
    what: str
    rate: str
    rank: int = 0
    four_bit: bool = False


_NATIVE_KINDS = {
    "hera": _NativeKind("fine-tuned with HeRA: full training of the LLM and the projector.", "1.0e-5"),
    "hera_lora": _NativeKind(
        "fine-tuned with LoRA and HeRA: adapters on the LLM, and full training of the projector.", "1.0e-4", LORA_RANK
    ),
    "hera_qlora": _NativeKind(
        "fine-tuned with QLoRA and HeRA on one 24 GB card: adapters on the 4-bit LLM.", "1.0e-4", QLORA_RANK, True
    ),
}


def _native(model: Backbone, name: str, dataset: str = "llava_instruct") -> Recipe:
    kind, sizes = _NATIVE_KINDS[name], SIZES[model.key]
    finevision = dataset == "finevision"  # some of its rows have several images
    cutoff = LONG_CUTOFF if finevision or sizes.image_tokens > CUTOFF // 2 else CUTOFF
    # The vision encoder is small, so its parameters are counted with the text decoder's.
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
    checkpoint = (
        model.checkpoint,
        "the model; the first run downloads it unless model_name_or_path is a local folder",
    )
    full_name, data_need = (f"{dataset}_{name}", _FINEVISION_NEED) if finevision else (name, _INSTRUCT_NEED)
    return Recipe(
        f"{model.key}_{full_name}",
        f"{model.title}, {kind.what}",
        [checkpoint, data_need, _TEACHER_NEED, *([_QUANT_NEED] if kind.four_bit else [])],
        work,
        plans,
        [
            sections.model(model.checkpoint, **model.keys, **(sections.QUANTIZED if kind.four_bit else {})),
            sections.method(keys),
            sections.hera("auto", batches),
            sections.data(dataset, model.template, cutoff),
            sections.output(f"{model.key}/{full_name}"),
            sections.train(batches, kind.rate),
        ],
        model.notes,
    )


def _finevision() -> Iterator[Recipe]:
    """Makes the recipes for the paper's fine-tuning of an existing VLM (appendix D) and for its baseline."""
    model = NATIVE_MODELS["qwen3_vl_4b"]
    hera = _native(model, "hera", "finevision")
    notes = (
        "The paper trains on 83k FineVision samples but specifies neither the samples nor its settings. The learning "
        "rate and the batch size are the same as in the other recipes for existing VLMs."
    )
    yield replace(
        hera,
        title=f"{model.title}, fine-tuned on FineVision with HeRA: full training of the LLM and the projector.",
        notes=notes,
    )
    title = f"{model.title}, fine-tuned on FineVision without HeRA: the baseline for {hera.name}.yaml."
    yield hera.without_hera(f"{model.key}_finevision_sft", title, f"saves/{model.key}/finevision_sft", notes)


def all_recipes() -> Iterator[Recipe]:
    """Makes every generated recipe."""
    for model in LANGUAGE_MODELS.values():
        yield _pretrain(model)
        yield _stage_two(model, "hera")
        yield _stage_two(model, "hera_lora")
        yield _baseline(model)
    for native in NATIVE_MODELS.values():
        yield _native(native, "hera")
        yield _native(native, "hera_lora")
    yield _native(NATIVE_MODELS["qwen2_5_vl_7b"], "hera_qlora")
    yield from _finevision()
    for key in ABLATED:
        yield from ablations(LANGUAGE_MODELS[key], _stage_two(LANGUAGE_MODELS[key], "hera"))
    model = LANGUAGE_MODELS[RIVALRY]
    yield from rivals(model, _pretrain(model), _stage_two(model, "hera"), _stage_two(model, "hera_lora"))


def write_recipes(folder: Path) -> list[Path]:
    """Writes every recipe into ``folder`` and returns the files."""
    files = []
    for recipe in all_recipes():
        files.append(folder / f"{recipe.name}.yaml")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(render(recipe), encoding="utf-8")
    return files


def write_index(page: Path) -> None:
    """Writes the tables of ablations between the marks of recipes/README.md."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{index()}\n{MARKS[1]}{after}", encoding="utf-8")
