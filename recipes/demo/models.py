"""The demo's models: a tokenizer, a tiny Qwen3, a SigLIP tower, a LLaVA made of both, and a DINOv2 teacher.

Each model is trained for a few seconds, only on the training data. The teacher sees only the images, not the
text, the labels or the properties of the scenes. The projector stays random until stage 1 trains it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence

MAX_LENGTH, VOCABULARY = 512, 600
SIDE, PATCH = 32, 8

SPECIAL_TOKENS = END_OF_TEXT, TURN_START, TURN_END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
# ChatML. The content of a message is text, or a list of images and texts; a line break follows each image.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class Encoder(NamedTuple):
    """The sizes (in pixels and channels) and the peak learning rate of a vision transformer with four heads."""

    side: int = SIDE
    patch: int = PATCH
    width: int = 64
    layers: int = 2
    rate: float = 3e-3

    def config(self) -> dict[str, Any]:
        """Returns the entries that all vision configurations share."""
        heads = {"hidden_size": self.width, "num_hidden_layers": self.layers, "num_attention_heads": 4}
        return {"image_size": self.side, "patch_size": self.patch, **heads}

    def square(self) -> dict[str, int]:
        """Returns the image size in the form that image processors expect."""
        return {"height": self.side, "width": self.side}


_TOWER, _TEACHER = Encoder(), Encoder(layers=3, rate=2e-3)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeds PyTorch on the CPU and uses one thread; restores the random state and number of threads at the end."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        torch.set_num_threads(1)  # with more threads, sums may be split and rounded differently
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _optimize(
    modules: list[torch.nn.Module], loss: Callable[[], torch.Tensor], steps: int, learning_rate: float
) -> list[float]:
    """Runs AdamW with warm-up and cosine decay, ends in eval mode, and returns the loss of every step."""
    together = torch.nn.ModuleList(modules).train()
    parameters = list(together.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps)))
    )
    losses = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    together.eval()
    return losses


def train_tokenizer(texts: Iterable[str]) -> hf.PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which is lossless for any text, with Qwen's chat tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    n_words = VOCABULARY - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=n_words, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))  # after the text tokens, as in Qwen
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, IMAGE],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def new_language_model(
    tokenizer: hf.PreTrainedTokenizerBase, head_dim: int = 16, intermediate_size: int = 256
) -> hf.Qwen3ForCausalLM:
    """Creates a random Qwen3 with 5 layers, 8 query and 4 key-value heads, and head_dim != hidden_size / heads."""
    stops: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape: dict[str, Any] = {"hidden_size": 96, "intermediate_size": intermediate_size, "head_dim": head_dim}
    heads: dict[str, Any] = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}
    words: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": False, "bos_token_id": None, **stops}
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(max_position_embeddings=MAX_LENGTH, **shape, **heads, **words))
    model.generation_config = hf.GenerationConfig(do_sample=False, max_new_tokens=64, **stops)
    return model


def train_language_model(
    model: hf.Qwen3ForCausalLM, tokenizer: hf.PreTrainedTokenizerBase, documents: list[str], steps: int
) -> list[float]:
    """Trains the model in place on next-token prediction, and returns the loss of every step."""
    encoded = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_LENGTH]) for text in documents]
    # A batch contains documents of similar length. Padding is on the right, so causal attention needs no padding mask.
    encoded.sort(key=len)
    batch_size = min(16, len(encoded))

    def loss() -> torch.Tensor:
        start = int(torch.randint(len(encoded) - batch_size + 1, ()))
        rows = encoded[start : start + batch_size]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        return model(input_ids=ids, labels=pad_sequence(rows, batch_first=True, padding_value=-100)).loss

    return _optimize([model], loss, steps, 4e-3)


def train_vision_tower(
    images: list[Image.Image], steps: int, encoder: Encoder = _TOWER
) -> tuple[hf.SiglipVisionModel, hf.SiglipImageProcessor, list[float]]:
    """Trains a SigLIP vision model as a masked autoencoder.

    Half of the patches are masked. A linear layer, which is discarded afterward, predicts all pixels from the patch
    tokens that LLaVA reads (``vision_feature_layer: -1``).

    Returns:
        The model, its image processor, and the pixel error of every step.
    """
    side, patch = encoder.side, encoder.patch
    tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(intermediate_size=2 * encoder.width, **encoder.config()))
    read_out = torch.nn.Linear(encoder.width, 3 * patch * patch)
    processor = hf.SiglipImageProcessor(size=encoder.square())
    pixels = processor(images, return_tensors="pt")["pixel_values"]

    def loss() -> torch.Tensor:
        batch = pixels[torch.randint(len(pixels), (128,))]
        hidden = torch.rand(len(batch), 1, side // patch, side // patch) < 0.5
        hidden = hidden.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        tokens = tower(batch.masked_fill(hidden, 0.0), output_hidden_states=True).hidden_states[-1]
        return F.mse_loss(read_out(tokens), F.unfold(batch, patch, stride=patch).transpose(1, 2))

    return tower, processor, _optimize([tower, read_out], loss, steps, encoder.rate)


def assemble_llava(
    language_model: hf.Qwen3ForCausalLM, tower: hf.SiglipVisionModel, tokenizer: hf.PreTrainedTokenizerBase
) -> tuple[hf.LlavaForConditionalGeneration, hf.LlavaProcessor]:
    """Assembles a LLaVA from two models and a random two-layer projector, with one image token per patch.

    Returns:
        The model and its processor.
    """
    vision: Any = tower.config
    side, patch = vision.image_size, vision.patch_size
    stops: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = hf.LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_model.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        **stops,
    )
    llava = hf.LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    llava.generation_config = language_model.generation_config
    settings = {"patch_size": patch, "vision_feature_select_strategy": "full", "chat_template": CHAT_TEMPLATE}
    images = hf.SiglipImageProcessor(size={"height": side, "width": side})
    return llava, hf.LlavaProcessor(images, tokenizer, **settings)


def random_view(pixels: torch.Tensor) -> torch.Tensor:
    """Creates a random view of each image, not mirrored and with recognizable colors.

    Args:
        pixels: Normalized images ``[B, 3, S, S]``.

    Returns:
        The views ``[B, 3, S, S]``.
    """
    count = len(pixels)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = torch.empty(count).uniform_(0.85, 1.15)
    affine[:, :, 2] = torch.empty(count, 2).uniform_(-0.15, 0.15)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    view = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2)
    cast = torch.empty(count, 3, 1, 1).uniform_(-0.2, 0.2) + torch.empty(count, 1, 1, 1).uniform_(-0.3, 0.3)
    return view * contrast + cast + 0.05 * torch.randn_like(view)


def train_teacher(
    images: list[Image.Image],
    steps: int,
    view: Callable[[torch.Tensor], torch.Tensor] = random_view,
    encoder: Encoder = _TEACHER,
) -> tuple[hf.Dinov2Model, hf.BitImageProcessor, list[float]]:
    """Trains a DINOv2 model with SimCLR (arXiv 2002.05709).

    The InfoNCE loss makes the two random views of an image most similar to each other among all views in the batch. It
    compares cosines of CLS tokens, at a temperature of 0.1, after a two-layer projection that is later discarded.

    Returns:
        The model, its image processor, and the loss of every step, in nats.
    """
    width = encoder.width
    teacher = hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **encoder.config()))
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width))
    processor = hf.BitImageProcessor(
        size={"shortest_edge": encoder.side},
        crop_size=encoder.square(),
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    batch_size = min(128, len(pixels))
    partners = torch.arange(2 * batch_size).roll(batch_size)

    def loss() -> torch.Tensor:
        batch = pixels[torch.randperm(len(pixels))[:batch_size]]
        vectors = F.normalize(head(teacher(torch.cat([view(batch), view(batch)])).last_hidden_state[:, 0]), dim=-1)
        similarity = (vectors @ vectors.T / 0.1).fill_diagonal_(float("-inf"))
        return F.cross_entropy(similarity, partners)

    return teacher, processor, _optimize([teacher, head], loss, steps, encoder.rate)
