"""Captions as token ids: the tokenizer's own special tokens are fed and not averaged over."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llamafactory_hera.selection.captions import CaptionSource, collate_captions

WORDS = {"[PAD]": 0, "<s>": 1, "</s>": 2, "a": 3, "red": 4, "cross": 5, "circle": 6, "[UNK]": 7}


@pytest.fixture
def tokenizer():
    """Puts ``<s>`` in front, as Llama's does."""
    core = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
    )


def source(tokenizer, texts, max_length=16):
    return CaptionSource(len(texts), lambda row: [], lambda row: texts[row], tokenizer, max_length)


def test_the_caption_is_averaged_over_and_bos_is_not(tokenizer):
    features = source(tokenizer, ["a red cross"]).encode(0)
    assert features == {"input_ids": [1, 3, 4, 5], "attention_mask": [1] * 4, "labels": [-100, 3, 4, 5]}


def test_a_long_caption_is_cut(tokenizer):
    features = source(tokenizer, ["a red cross"], max_length=3).encode(0)
    assert features["input_ids"] == [1, 3, 4]


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_caption_is_none(tokenizer, text):
    assert source(tokenizer, [text]).encode(0) is None


def test_padding_is_on_the_right_and_outside_of_everything(tokenizer):
    features = source(tokenizer, ["a red cross", "circle"])
    batch = collate_captions([features.encode(0), features.encode(1)], pad_token_id=0)
    assert torch.equal(batch["input_ids"], torch.tensor([[1, 3, 4, 5], [1, 6, 0, 0]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[-100, 3, 4, 5], [-100, 6, -100, -100]]))
