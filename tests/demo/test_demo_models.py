import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from llamafactory_hera.demo.language import new_language_model


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llava(demo):
    return AutoModelForImageTextToText.from_pretrained(demo["model"])


@pytest.fixture(scope="module")
def language_model(demo):
    return AutoModelForCausalLM.from_pretrained(demo["language_model"])


def held_out(demo, tokenizer) -> tuple[list[str], list[Image.Image]]:
    rows = json.loads((demo["data"] / "demo_heldout.json").read_text())[:8]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return texts, [Image.open(demo["data"] / row["images"][0]) for row in rows]


def test_auto_classes_give_the_classes_and_shapes_of_a_siglip_qwen3_llava(llava, language_model):
    assert type(llava).__name__ == "LlavaForConditionalGeneration"
    assert type(llava.model.vision_tower).__name__ == "SiglipVisionModel"
    assert type(language_model).__name__ == "Qwen3ForCausalLM"
    config = llava.config.text_config
    assert 4 <= config.num_hidden_layers <= 6
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert (llava.config.vision_feature_layer, llava.config.vision_feature_select_strategy) == (-1, "full")


def test_images_give_sixteen_tokens_each_a_finite_loss_and_change_the_answer(demo, llava):
    processor = AutoProcessor.from_pretrained(demo["model"])
    texts, images = held_out(demo, processor.tokenizer)
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert (batch["input_ids"] == llava.config.image_token_id).sum(1).tolist() == [16] * len(texts)
    assert batch["pixel_values"].shape[1:] == (3, 32, 32)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        seen = llava(**batch, labels=labels)
        blank = llava(**batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])})
    assert torch.isfinite(seen.loss)
    assert (seen.logits - blank.logits).abs().max() > 1e-3


def test_text_only_logits_are_those_of_the_language_model(demo, llava, language_model):
    tokenizer = AutoTokenizer.from_pretrained(demo["language_model"])
    texts = [text.replace("<image>\n", "") for text in held_out(demo, tokenizer)[0]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(llava(**batch).logits, language_model(**batch).logits, rtol=0, atol=0)


def test_pretraining_on_training_text_helps_on_held_out_text(demo, language_model):
    tokenizer = AutoTokenizer.from_pretrained(demo["language_model"])
    texts = [text.replace("<image>\n", "") for text in held_out(demo, tokenizer)[0]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    torch.manual_seed(0)
    with torch.no_grad():
        start = new_language_model(tokenizer)(**batch, labels=labels).loss
        trained = language_model(**batch, labels=labels).loss
    assert trained < start - 1.5


def test_every_training_lowers_its_loss(demo):
    losses = json.loads((demo["root"] / "demo.json").read_text())["losses"]
    assert set(losses) == {"language_model", "vision_tower", "teacher"}
    for name, entry in losses.items():
        assert entry["last_loss"] < 0.8 * entry["first_loss"], name


def test_generation_stops_at_the_end_of_a_turn(demo, llava):
    config = llava.generation_config
    tokenizer = AutoTokenizer.from_pretrained(demo["model"])
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
