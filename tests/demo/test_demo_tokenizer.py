import json

import pytest
from transformers import AutoProcessor, AutoTokenizer

from llamafactory_hera.demo.tokenizer import train_tokenizer

TEXTS = ["A large red circle is at the top left.", "How many crosses are there?", "zwölf \t Ünïcode ✓ 円\n\n", "a  b"]


def demo_texts(demo) -> list[str]:
    files = [demo["data"] / f"demo_{name}.json" for name in ("train", "heldout", "captions", "text")]
    rows = [row for file in files for row in json.loads(file.read_text())]
    return [message["content"] for row in rows for message in row["messages"]]


def test_all_text_survives_encoding_after_loading_by_the_auto_classes(demo):
    loaded = [AutoTokenizer.from_pretrained(demo[name]) for name in ("model", "language_model")]
    loaded.append(AutoProcessor.from_pretrained(demo["model"]).tokenizer)
    for tokenizer in loaded:
        for text in TEXTS + demo_texts(demo):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert ids == loaded[0](text)["input_ids"]


def test_chat_tokens_are_single_special_tokens(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo["model"])
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"):
        (only,) = tokenizer(token)["input_ids"]
        assert only in tokenizer.all_special_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) <= 600


def test_common_words_are_one_token(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo["model"])
    for word in (" circle", " triangle", " yellow", " left", " objects", "assistant"):
        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_chat_template_is_chatml(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo["language_model"])
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nQ"}]},
        {"role": "assistant", "content": "A"},
    ]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
    assistant = "<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == expected + assistant + "A<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == expected + assistant


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary=100: choose at least 260"):
        train_tokenizer(TEXTS, vocabulary=100)
