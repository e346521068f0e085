"""Mixed and packed samples of LLaMA-Factory are aligned as if each sample had its own row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.heads import Targets
from llamafactory_hera.integrations.llamafactory.checks import check_run, checked_dataset, packed_pieces
from llamafactory_hera.integrations.llamafactory.recipe import host_arguments
from llamafactory_hera.training import Aligner

from ..backbones.standins import save_native
from ..backbones.tiny import save_tower
from ..tiny_models import image_files, vlm
from .conftest import LORA
from .runner import write_dataset

pytestmark = pytest.mark.slow

#: Folder of a model -> its template.
MODELS = {"llava_1_5_7b": "llava", "qwen2_5_vl_7b": "qwen2_vl"}
CUTOFF = 560
#: The images of each sample in one batch. Three samples begin with image 0, so they form three duplicate pairs.
IMAGES = [[0], [1], [0, 1], [2], [3], [0], [], [], []]
#: The videos of each sample: the last two have a video, and the one before them is only text.
VIDEOS = [[]] * 7 + [[1, 2], [2, 3]]
Row = dict[str, Any]


def _sample(images: list[int], answer: str, videos: list[int]) -> Row:
    question = "<image>" * len(images) + "<video>" * bool(videos) + "What is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    names, frames = ([f"{image}.png" for image in each] for each in (images, videos))
    return {"conversations": turns, "images": names, "videos": [frames] if frames else []}


def _packed_sample(number: int) -> Row:
    """Makes a sample with up to two images and a unique answer; lengths vary."""
    images = [[], [number], [number], [number, (number + 1) % 12]][number % 4]
    return _sample(images, f"It is {'very ' * (number if images else number + 6)}small.", [])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, a teacher, images, samples to pack, and one batch of mixed samples."""
    folder = tmp_path_factory.mktemp("packed")
    for key in MODELS:
        save_native(key, folder / key)
    save_tower("dinov2", folder / "teacher")
    image_files(folder, 12, (56, 56))
    (folder / "mixed").mkdir()
    mixed = [
        _sample(images, f"It is {images or videos}.", videos) for images, videos in zip(IMAGES, VIDEOS, strict=True)
    ]
    columns = {"messages": "conversations", "images": "images"}
    write_dataset(folder, [_packed_sample(number) for number in range(12)], formatting="sharegpt", columns=columns)
    write_dataset(folder / "mixed", mixed, formatting="sharegpt", columns=columns | {"videos": "videos"})
    return folder


class Host:
    """The rows and the collators of LLaMA-Factory for a model."""

    def __init__(self, root: Path, name: str) -> None:
        self.folder, self.teacher = root / name, root / "teacher"
        keys = {"model_name_or_path": str(self.folder), "template": MODELS[name], "cutoff_len": CUTOFF, "stage": "sft"}
        keys |= {"dataset": "rows", "dataset_dir": str(root), "media_dir": str(root), "overwrite_cache": True}
        keys |= {"do_train": True, "output_dir": str(root / "out"), "report_to": "none", "use_cpu": True}
        self.rows: dict[bool, Any] = {}
        for packed in (False, True):
            model, self.data, training, *_ = get_train_args(keys | {"neat_packing": packed})
            self.tokens = load_tokenizer(model)
            self.template = get_template_and_fix_tokenizer(self.tokens["tokenizer"], self.data)
            dataset = get_dataset(self.template, model, self.data, training, stage="sft", **self.tokens)
            self.rows[packed] = dataset["train_dataset"]

    def packed(self, *rows: int) -> list[Row]:
        return [self.rows[True][row] for row in rows]

    def unpacked(self, *rows: int) -> list[Row]:
        """Returns the samples of packed rows, each in its own row."""
        alone = {tuple(row["input_ids"]): row for row in self.rows[False]}
        return [
            alone[tuple(row["input_ids"][piece.start : piece.stop])]
            for row in self.packed(*rows)
            for piece in packed_pieces(row)
        ]

    def collator(self, model: nn.Module, aligner: Aligner, attention: str | None) -> Callable[[list[Row]], Row]:
        """Wraps the host's collator in HeRA's; if ``attention`` is given, the host's collator packs rows."""
        packed = attention is not None
        kinds = {"block_diag_attn": packed, "neat_packing": packed, "attn_implementation": attention or "sdpa"}
        common = {"template": self.template, "pad_to_multiple_of": 8, "label_pad_token_id": -100}
        collate = SFTDataCollatorWith4DAttentionMask(model=model, **common, **kinds, **self.tokens)
        wrapped = aligner.collator(collate, pieces_of=packed_pieces if packed else None)
        return lambda rows: wrapped([dict(row) for row in rows])  # the host's collator empties rows


class Step(NamedTuple):
    """The results of a step of one micro-batch."""

    valid: list[bool]
    representations: Tensor
    term: Tensor
    gradients: dict[str, Tensor]


def as_flash_attention_reads(positions: Tensor) -> Tensor:
    """Returns the mask that FlashAttention derives from the positions, which restart at each sample of a row."""
    (borders, _), _ = prepare_fa_kwargs_from_position_ids(positions[0] if positions.dim() == 3 else positions)
    tokens = torch.arange(positions.shape[-1])
    number = torch.searchsorted(borders.long(), tokens, right=True)
    seen = (number == number.unsqueeze(1)) & (tokens <= tokens.unsqueeze(1))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def step(host: Host, model: nn.Module, rows: list[Row], attention: str | None, lm: bool = True, **keys: Any) -> Step:
    config = {"heads": "L1H0,L0H2,L1H3", "teacher": str(host.teacher), "k": 2, "memory": 0, "weight": 1.0}
    aligner = Aligner(model, HeraConfig(**config | keys))
    batch = host.collator(model, aligner, attention)(rows)
    prepared = aligner.prepare(batch)
    if batch["attention_mask"] is None:
        batch["attention_mask"] = as_flash_attention_reads(batch["position_ids"])
    loss = model(**batch).loss
    term = aligner.loss(prepared)
    (loss + term if lm else term).backward()
    z = aligner.capture.representations().detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = Step(prepared.valid.tolist(), z, term.detach(), gradients)
    aligner.after_backward()
    aligner.close()
    model.zero_grad()
    return found


@pytest.fixture(scope="module", params=MODELS)
def host(request: pytest.FixtureRequest, root: Path) -> Host:
    return Host(root, request.param)


# -- one step --------------------------------------------------------------------------------------------------------

LAYER = {"granularity": "layer", "layers": "L1", "heads": None}
FLASH = "flash_attention_2"


@pytest.mark.parametrize(
    ("attention", "lora", "reentrant", "keys"),
    [
        ("sdpa", False, None, {}),
        ("sdpa", False, True, {"pooling": "text"}),
        ("sdpa", True, False, {"pooling": "mean"}),
        ("sdpa", False, False, LAYER),
        (FLASH, False, None, {"pooling": "last"}),
        (FLASH, True, True, LAYER),
    ],
)
def test_packed_samples_have_the_values_of_unpacked_samples(host, attention, lora, reentrant, keys):
    model: Any = AutoModelForImageTextToText.from_pretrained(host.folder, dtype=torch.float32).train()
    if lora:
        targets = r".*language_model.*\.(q|v|o)_proj"
        model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
        model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    numbers = (0, 1) if attention == "sdpa" else (0,)  # with FlashAttention, the host packs a batch into one row
    found = step(host, model, host.packed(*numbers), attention, **keys)
    expected = step(host, model, host.unpacked(*numbers), None, **keys)
    assert found.valid == expected.valid
    assert 3 <= sum(found.valid) < len(found.valid)
    valid = torch.tensor(found.valid)
    torch.testing.assert_close(
        found.representations[:, valid], expected.representations[:, valid], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.term, expected.term, rtol=1e-5, atol=1e-6)
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    assert largest > 0
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-5 * largest, msg=name)


def test_a_packed_row_without_its_borders_is_refused_before_the_model_is_loaded(host):
    lacking = host.rows[True].remove_columns("packing_params")
    get_checked = checked_dataset(lambda *args, **kwargs: {"train_dataset": lacking})
    with pytest.raises(ValueError, match=r"^neat_packing: True needs the packing_params column, .* tokenize the data"):
        get_checked(host.template, None, host.data, **host.tokens)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("qwen3_5", "L0 of qwen3_5_text ignore the boundaries .* flash_attn: fa2.; remove the key"),
        ("gemma4", "the loss of gemma4_text cannot read the attention mask of packed rows; remove the key"),
    ],
)
def test_models_that_cannot_separate_the_samples_of_a_row_are_refused(kind, problem, root, tmp_path):
    vlm(kind).config.save_pretrained(tmp_path)
    keys = {"stage": "hera", "do_train": True, "model_name_or_path": str(tmp_path), "template": "qwen2_vl"}
    keys |= {"dataset": "rows", "dataset_dir": str(root), "output_dir": str(tmp_path / "out"), "use_cpu": True}
    host = host_arguments(keys | {"hera_teacher": str(root / "teacher"), "neat_packing": True})
    with pytest.raises(ValueError, match=f"^neat_packing: True does not work with stage: hera, because {problem}"):
        check_run(HeraConfig.from_keys(host.finetuning), host)


# -- whole runs ------------------------------------------------------------------------------------------------------

PACKED = {"neat_packing": True, "cutoff_len": 640, "max_steps": 2}
AUTO = {"hera_heads": "auto", "hera_select_samples": 64, "hera_select_k": 8}


def test_a_packed_run_selects_the_heads_of_an_unpacked_run_on_any_number_of_processes(train):
    alone = train(AUTO, {"max_steps": 1})
    one = train(PACKED, AUTO, {"per_device_train_batch_size": 2})
    two = train(PACKED, AUTO, {"per_device_train_batch_size": 1}, ranks=2)
    heads = [Targets.load(run.folder / "hera/heads.json") for run in (alone, one, two)]
    assert heads[0].items == heads[1].items == heads[2].items
    assert "in packed rows" in one.output
    found, expected = one.logs(), two.logs()
    assert found[0]["hera_loss"] == pytest.approx(expected[0]["hera_loss"], rel=1e-5)
    assert found[0]["hera_loss"] > 0


@pytest.mark.parametrize(("accumulate", "ranks"), [("none", 1), ("gradcache", 1), ("gradcache", 2)])
def test_a_packed_run_accumulates_and_remembers_samples(train, accumulate, ranks):
    keys = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "hera_accumulate": accumulate}
    run = train(PACKED, LORA, keys, {"hera_memory": 8}, ranks=ranks)
    assert len(load_file(run.folder / "hera/state.safetensors")["memory.teacher"]) == 8  # from four rows of a process
    assert run.logs()[1]["hera_loss"] > 0


def test_only_samples_with_an_image_enter_the_term_and_duplicates_are_not_neighbors(train, root):
    args = {"model_name_or_path": "qwen2_5_vl_7b", "template": "qwen2_vl", "cutoff_len": 512, "max_steps": 2}
    args |= {"dataset": "rows", "dataset_dir": "mixed", "media_dir": ".", "per_device_train_batch_size": len(IMAGES)}
    args |= {"hera_heads": "L0H1,L1H0", "hera_teacher": "teacher", "hera_teacher_cache": None, "hera_k": 2}
    run = train(args, cwd=root)
    first = [images[0] for images in IMAGES if images]
    candidates = [sum(other != image for other in first) for image in first]
    chance = sum(min(2, n // 2) / n for n in candidates) / len(first)  # at most half of the candidates are neighbors
    copies = sum(first[i] == first[j] for i in range(len(first)) for j in range(i))
    for line in run.logs():
        assert line["hera_duplicates"] == copies == 3
        assert line["hera_mknn_chance"] == pytest.approx(chance)
        assert 0 < line["hera_loss"] < 10
