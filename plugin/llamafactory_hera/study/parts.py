"""The parts that all runs share, made from training images and text alone: tokenizer, tower, teacher, models."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM, SiglipVisionModel

from ..demo import teacher as teachers
from ..demo import vision
from ..demo.language import MAX_LENGTH, generation_config
from ..demo.tokenizer import train_tokenizer
from ..demo.training import reproducible
from .dataset import CAPTIONS, TRAIN
from .settings import Settings

GREY = 0.4


def make_tokenizer(data: Path, target: Path) -> None:
    """Train the tokenizer on the training split's text."""
    texts = [message["content"] for row in _read(data / f"{CAPTIONS}.json") for message in row["messages"]]
    for row in _read(data / f"{TRAIN}.json"):
        for message in row["messages"]:
            texts += [message["role"], "\n" + message["content"].removeprefix("<image>\n")]
    train_tokenizer([text for text in texts if text != "<image>"], max_length=MAX_LENGTH).save_pretrained(target)


def make_language_model(tokenizer: Path, target: Path, seed: int) -> None:
    """A language model with random weights, for the host to pre-train: five layers of eight heads of 12."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=12,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with reproducible(seed):
        model = Qwen3ForCausalLM(config)
    model.generation_config = generation_config(words)
    model.save_pretrained(target)
    words.save_pretrained(target)


def make_tower(data: Path, target: Path, settings: Settings) -> None:
    """The vision tower: a masked autoencoder of the training images, frozen from then on."""
    pixels = training_pixels(data, vision.image_processor())
    with reproducible(0):
        tower = vision.new_vision_tower()
        losses = vision.pretrain_vision_tower(tower, pixels, settings.tower_steps)
    tower.save_pretrained(target)
    print(f"vision tower: pixel error {losses[0]:.4f} -> {losses[-1]:.4f}")


def make_teacher(data: Path, target: Path, settings: Settings) -> None:
    """The teacher: self-supervised on the training images, with its own processor.

    The demo's training, but a view is often grey. Colours and places alone tell almost every image of these scenes
    from the others, and a teacher that always sees colours learns little about shapes.
    """
    processor = teachers.image_processor()
    pixels = training_pixels(data, processor)
    with reproducible(0):
        teacher = teachers.new_teacher()
        losses = teachers.train_teacher(teacher, pixels, settings.teacher_steps, view=_partly_grey_view)
    teacher.save_pretrained(target)
    processor.save_pretrained(target)
    print(f"teacher: contrastive loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def _partly_grey_view(pixels: torch.Tensor) -> torch.Tensor:
    """A random view of every image, grey with probability ``GREY``: [B, 3, S, S] -> [B, 3, S, S]."""
    view = teachers.random_view(pixels)
    grey = torch.rand(len(view), 1, 1, 1) < GREY
    return torch.where(grey, view.mean(dim=1, keepdim=True), view)


def make_llava(language_model: Path, tower: Path, target: Path, seed: int) -> None:
    """A LLaVA of both parts with a random projector and the language model's tokenizer."""
    words = AutoTokenizer.from_pretrained(language_model)
    with reproducible(seed):
        llava = vision.assemble_llava(
            Qwen3ForCausalLM.from_pretrained(language_model), SiglipVisionModel.from_pretrained(tower), words
        )
    llava.save_pretrained(target)
    vision.new_processor(words).save_pretrained(target)


def training_pixels(data: Path, processor: Any) -> torch.Tensor:
    """The training images in the order of their names, processed: [N, 3, 32, 32]."""
    images = [Image.open(path).convert("RGB") for path in sorted((data / "images").glob("train_*.png"))]
    return processor(images, return_tensors="pt")["pixel_values"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
