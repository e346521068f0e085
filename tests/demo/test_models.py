import json
import random

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from llamafactory_hera.demo.models import THREADS, new_language_model, random_view, reproducible, train_teacher
from llamafactory_hera.demo.scenes import render, sample_scene

TEXTS = ["A large red circle is at the top left.", "How many crosses are there?", "zwölf \t Ünïcode ✓ 円\n\n", "a  b"]


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


def test_text_alone_gives_the_logits_of_the_language_model_which_learned_from_training_text(
    demo, llava, language_model
):
    tokenizer = AutoTokenizer.from_pretrained(demo["language_model"])
    texts = [text.replace("<image>\n", "") for text in held_out(demo, tokenizer)[0]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        start = new_language_model(tokenizer)(**batch, labels=labels).loss
        trained = language_model(**batch, labels=labels)
        torch.testing.assert_close(llava(**batch).logits, trained.logits, rtol=0, atol=0)
    assert trained.loss < start - 1.5


def test_every_training_lowers_its_loss(demo):
    losses = json.loads((demo["root"] / "demo.json").read_text())["losses"]
    assert set(losses) == {"language_model", "vision_tower", "teacher"}
    for name, entry in losses.items():
        assert entry["last_loss"] < 0.8 * entry["first_loss"], name


def shared_pairs(scenes) -> torch.Tensor:
    """Jaccard overlap of the (color, shape) pairs of every two scenes: [N, N]."""
    pairs = [{item.pair for item in scene.objects} for scene in scenes]
    return torch.tensor([[len(a & b) / len(a | b) for b in pairs] for a in pairs])


def neighbor_overlap(teacher, pixels: torch.Tensor, overlap: torch.Tensor, k: int = 10) -> float:
    """Mean overlap of an image with its k nearest neighbors by the teacher's CLS token."""
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(teacher(pixels).last_hidden_state[:, 0], dim=-1)
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(k).indices
    return overlap.gather(1, nearest).mean().item()


def test_training_brings_images_of_the_same_things_together_without_labels():
    rng = random.Random("teacher")
    train = [render(sample_scene(rng)) for _ in range(192)]
    unseen = [sample_scene(rng) for _ in range(128)]
    overlap = shared_pairs(unseen)
    chance = (overlap.sum() - overlap.trace()) / (128 * 127)

    def trained(steps: int) -> tuple[float, list[float]]:
        with reproducible(0):
            teacher, processor, losses = train_teacher(train, steps)
            pixels = processor([render(scene) for scene in unseen], return_tensors="pt")["pixel_values"]
            return neighbor_overlap(teacher, pixels, overlap), losses

    (before, _), (after, losses) = trained(0), trained(60)
    assert losses[-1] < 0.6 * losses[0]
    assert after > 1.7 * chance
    assert after > before + 0.03


def test_saved_teacher_loads_by_the_auto_classes_and_has_a_cls_token(demo):
    teacher = AutoModel.from_pretrained(demo["teacher"])
    processor = AutoImageProcessor.from_pretrained(demo["teacher"])
    assert type(teacher).__name__ == "Dinov2Model"
    assert type(processor).__name__.startswith("BitImageProcessor")
    pixels = processor([render(sample_scene(random.Random(0)))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    with torch.no_grad():
        assert teacher(pixels).last_hidden_state.shape == (1, 1 + 16, 64)


def test_views_keep_left_and_right_apart():
    pixels = torch.zeros(64, 3, 32, 32)
    pixels[:, :, 8:24, 2:10] = 3.0
    with reproducible(0):
        views = random_view(pixels).mean(1)
    assert (views[:, :, :16].mean((1, 2)) > views[:, :, 16:].mean((1, 2))).all()


def test_reproducible_leaves_the_callers_random_state_and_threads():
    drawn = []

    def fail() -> None:
        with reproducible(3):
            drawn.append((torch.rand(4), torch.get_num_threads()))
            raise KeyError

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(THREADS + 1)
    try:
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == THREADS + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    with reproducible(3):
        assert torch.equal(torch.rand(4), drawn[0][0])
    assert drawn[0][1] == THREADS


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


def test_chat_tokens_are_single_special_tokens_common_words_one_and_a_turns_end_stops(demo, llava):
    tokenizer = AutoTokenizer.from_pretrained(demo["model"])
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"):
        (only,) = tokenizer(token)["input_ids"]
        assert only in tokenizer.all_special_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) <= 600
    stops = llava.generation_config.eos_token_id, llava.generation_config.pad_token_id
    assert stops == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for word in (" circle", " triangle", " yellow", " left", " objects", "assistant"):
        assert len(tokenizer(word)["input_ids"]) == 1, word


def test_chat_template_is_chatml(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo["language_model"])
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A"},
    ]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
    assistant = "<|im_start|>assistant\n"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == expected + assistant + "A<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == expected + assistant
