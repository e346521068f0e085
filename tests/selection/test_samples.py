"""The draw of samples, and captions as token ids."""

import copy
import logging

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.selection.samples import draw, draw_samples, encode_caption
from tests.tiny_models import noise_images

from .tiny import Rows, captions, settings

IMAGES = [[image] for image in noise_images(30)]


def some(**keys) -> HeraConfig:
    return settings(**{"select_samples": 20, "select_k": 3, **keys})


def test_samples_are_deduplicated_by_the_image_that_the_teacher_sees():
    shared, *second = noise_images(7)
    source = Rows([[shared, image] for image in second], captions(6))
    assert len(draw(source, 6, seed=0)[0]) == 1
    found, *_ = draw(source, 6, seed=0, image_index=-1)
    assert sorted(sample.row for sample in found) == list(range(6))
    assert all(sample.image is second[sample.row] for sample in found)


def test_the_draw_depends_only_on_the_seed_and_a_smaller_draw_is_a_prefix_of_a_larger_one():
    source = Rows(IMAGES, captions(30))
    first = draw_samples(source, some(select_seed=1))
    assert len(first) == 20
    assert first == draw_samples(source, some(select_seed=1))
    assert first != draw_samples(source, some(select_seed=2))
    assert draw_samples(source, some(select_seed=1, select_samples=7)) == first[:7]


def test_samples_without_image_or_tokens_are_skipped(caplog):
    images, features = list(IMAGES), captions(30)
    images[3] = []
    features[5] = None
    features[7]["labels"] = [-100] * len(features[7]["labels"])
    with caplog.at_level(logging.WARNING):
        drawn = draw_samples(Rows(images, features), some(select_samples=30))
    assert len(drawn) == 27
    problem = "hera_select_samples: 30 were requested, but only 27 can be scored (1 have no image, 2 have no text"
    assert problem in caplog.text


UNLABELED = {"input_ids": [5], "labels": [-100], "attention_mask": [1]}


@pytest.mark.parametrize(
    ("images", "features", "problem"),
    [
        (IMAGES[:2] + [[]] * 28, captions(30), r"dataset: 2 of its 30 .*28 have no image.*a selection needs 3"),
        (IMAGES, [None] * 30, "dataset: 0 of its 30 .* 30 have no text"),
        (IMAGES, [UNLABELED] * 30, "dataset: 0 of its 30 .* 30 have no text"),
        ([["gone.png"], *IMAGES[1:]], captions(30), r"^dataset: sample 0 .*gone\.png"),
        ([[None], *IMAGES[1:]], captions(30), r"^dataset: sample 0 .* has the type NoneType; give a path"),
    ],
)
def test_a_dataset_that_cannot_be_scored_is_refused(images, features, problem):
    with pytest.raises(ValueError, match=problem):
        draw_samples(Rows(images, features), some(select_samples=30))


def test_an_image_that_pil_takes_for_a_decompression_bomb_is_refused_with_its_sample(monkeypatch, tmp_path):
    class Opening(Rows):
        def encode(self, row):
            Image.open(self.images(row)[0]).load()

    path = tmp_path / "large.png"
    Image.new("L", (50, 50)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(
        ValueError, match=r"^dataset: sample 0 .*Image size \(2500 pixels\) exceeds .*; shrink this image"
    ):
        draw(Opening([[str(path)]], []), 1, seed=0)


@pytest.mark.parametrize(("n_samples", "warns"), [(12, True), (20, False)])
def test_a_draw_with_a_high_chance_level_gives_a_warning(caplog, n_samples, warns):
    with caplog.at_level(logging.WARNING):
        draw_samples(Rows(IMAGES, captions(30)), some(select_samples=n_samples))
    assert ("mostly noise" in caplog.text) == warns


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer that begins every text with ``<s>``, as Llama's does."""
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, "a": 3, "red": 4, "cross": 5, "circle": 6, "[UNK]": 7}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
    )


def test_a_caption_has_labels_except_on_bos_and_is_cut_and_an_empty_one_is_none(tokenizer):
    features = encode_caption("a red cross", tokenizer, 16)
    assert features == {"input_ids": [1, 3, 4, 5], "attention_mask": [1] * 4, "labels": [-100, 3, 4, 5]}
    assert encode_caption("a red cross", tokenizer, 3)["input_ids"] == [1, 3, 4]
    assert encode_caption("", tokenizer, 16) is None
    assert encode_caption("  \n ", tokenizer, 16) is None


def test_a_tokenizer_whose_chat_template_writes_bos_gives_the_same_caption(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_bos_token, other.chat_template = False, "{{ bos_token }}{{ messages[0]['content'] }}"
    for length in (3, 16):
        assert encode_caption("a red cross", other, length) == encode_caption("a red cross", tokenizer, length)
