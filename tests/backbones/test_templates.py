"""The registered templates, token by token against the language models' own chat templates with image tokens put in.

``HERA_TOKENIZERS`` may name a folder with real tokenizers in ``qwen2_5/``, ``qwen3/`` (Instruct-2507),
``qwen3_hybrid/``, ``llama3/`` or ``vicuna/``: they are then tested too.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from PIL import Image

from llamafactory_hera.backbones.build import build_backbone

from .tiny import FAMILIES, new_tokenizer, save_language_model

REAL = Path(os.environ["HERA_TOKENIZERS"]) if "HERA_TOKENIZERS" in os.environ else None
CASES = [(family, False) for family in FAMILIES] + [
    (family, True) for family in FAMILIES if REAL is not None and (REAL / family).is_dir()
]
N_TOKENS = 16
TURNS = [
    ("<image>\nWhat is shown in this image?", "A red car. It has four wheels\nand a spare one."),
    ("Who sits in it?", "Nobody, it's empty."),
    ("Why?", "The driver has left."),
]
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}{'-real' if case[1] else ''}")
def built(request: pytest.FixtureRequest, checkpoints: dict, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family, the language model's tokenizer, and the processor of the model built on it."""
    family, real = request.param
    folder = tmp_path_factory.mktemp(family)
    llm, tokenizer = checkpoints[family], new_tokenizer(family)
    if real:
        tokenizer = tf.AutoTokenizer.from_pretrained(REAL / family)
        llm = save_language_model(family, folder / "llm", rows=len(tokenizer))
        tokenizer.save_pretrained(llm)
    backbone = build_backbone(str(llm), str(checkpoints["siglip"]), folder / "built")
    assert backbone.template == FAMILIES[family]
    return family, tokenizer, backbone


def conversation(turns: list, system: str | None = None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return start + [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]


def encoded(template_name: str, folder: Path, turns: list, system: str | None = None) -> tuple[list[int], list[int]]:
    """Input ids and labels of a conversation, made by the host's own data processor."""
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    data_args = DataArguments(template=template_name, cutoff_len=2048)
    processor = tf.AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    rows = len(tokenizer)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    assert len(tokenizer) == rows, "the template adds tokens that the embedding has no row for"
    host = SupervisedDatasetProcessor(template, tokenizer, processor, data_args)
    messages = conversation(turns)
    images = [Image.new("RGB", (40, 30))] * sum(turn[0].count("<image>") for turn in turns)
    return host._encode_data_example(messages[:-1], messages[-1:], system, None, images, [], [])


def expanded(text: str) -> str:
    return text.replace("<image>", "<image>" * N_TOKENS)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered conversation; a BOS at its head is a token, not text."""
    bos = tokenizer.bos_token
    if bos and text.startswith(bos):
        rest = tokenizer.encode(text.removeprefix(bos), add_special_tokens=False)
        return [tokenizer.bos_token_id, *rest]
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("n_turns", [1, 3])
@pytest.mark.parametrize("system", [None, "You answer in one word."])
def test_training_sees_what_the_models_own_chat_template_renders(built: Any, n_turns: int, system: str | None) -> None:
    family, tokenizer, backbone = built
    turns = TURNS[:n_turns]
    processor = tf.AutoProcessor.from_pretrained(backbone.folder)
    ids, _ = encoded(backbone.template, backbone.folder, turns, system)
    rendered = processor.apply_chat_template(conversation(turns, system), tokenize=False)
    if tokenizer.chat_template is not None:
        own = tokenizer.apply_chat_template(conversation(turns, system), tokenize=False)
        # the hybrid models' empty thought is the one thing that is left out
        assert rendered == (own.replace(THOUGHT, "") if family == "qwen3_hybrid" else own)
    expected = ids_of(processor.tokenizer, expanded(rendered))
    assert ids == expected
    assert ids.count(backbone.image_token_id) == N_TOKENS


def test_the_loss_is_taken_on_the_answers_and_their_end(built: Any) -> None:
    _, _, backbone = built
    ids, labels = encoded(backbone.template, backbone.folder, TURNS)
    tokenizer = tf.AutoTokenizer.from_pretrained(backbone.folder)
    learned = tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)
    end = {"llava_vicuna": "</s>", "llava_llama3": "<|eot_id|>"}.get(backbone.template, "<|im_end|>\n")
    answers = [answer for _, answer in TURNS]
    # SentencePiece writes the space in front of an answer
    assert [part.removeprefix(" ") for part in learned.split(end)] == [*answers, ""]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_a_prompt_for_generation_is_the_beginning_of_what_was_trained(built: Any) -> None:
    _, _, backbone = built
    processor = tf.AutoProcessor.from_pretrained(backbone.folder)
    parts = [{"type": "image"}, {"type": "text", "text": "What is shown in this image?"}]
    messages = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids, labels = encoded(backbone.template, backbone.folder, TURNS[:1])
    n_prompt = labels.index(next(label for label in labels if label != -100))
    assert ids_of(processor.tokenizer, expanded(prompt)) == ids[:n_prompt]


def test_stage_one_is_the_image_and_its_caption(built: Any) -> None:
    _, tokenizer, backbone = built
    caption = "A dog runs over the grass."
    asked = [("Give a short account of the image.\n<image>", caption)]
    ids, labels = encoded("llava_plain", backbone.folder, asked)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    caption_ids = tokenizer.encode(f"{caption}\n", add_special_tokens=False)
    prompt = [*bos, *[backbone.image_token_id] * N_TOKENS]
    assert ids == [*prompt, *caption_ids]
    assert labels == [-100] * len(prompt) + caption_ids
    assert (ids, labels) == encoded("llava_plain", backbone.folder, [("<image>", caption)], system="Be brief.")


def test_host_templates_are_left_as_they_are() -> None:
    from llamafactory.data.template import TEMPLATES

    assert TEMPLATES["llama3"].stop_words == ["<|eot_id|>", "<|eom_id|>"]
    assert TEMPLATES["vicuna"].format_prefix.apply() == []
    assert TEMPLATES["qwen3_nothink"].mm_plugin.image_token is None
    assert TEMPLATES["llava"].mm_plugin is not TEMPLATES["llava_vicuna"].mm_plugin
