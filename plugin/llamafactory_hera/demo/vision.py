"""The demo's vision tower and the LLaVA that is put together from it.

A random tower would hide most of the pixels behind noise, so it is first trained for some seconds as a masked
autoencoder on the training images: half of the patches are greyed out and a linear layer, thrown away afterwards,
reads all pixels back from the patch tokens. No text and no label is used. The projector stays random: training it is
what stage 1 is for.
"""

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .tokenizer import IMAGE
from .training import optimise

IMAGE_SIDE = 32
PATCH = 8


def image_processor() -> SiglipImageProcessor:
    """Resize to the tower's 32×32 pixels and scale to -1…1."""
    return SiglipImageProcessor(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})


def new_vision_tower() -> SiglipVisionModel:
    """A SigLIP vision model with random weights: 16 patch tokens of width 64, no CLS token."""
    config = SiglipVisionConfig(
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return SiglipVisionModel(config)


def patch_tokens(tower: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """The features that LLaVA reads (``vision_feature_layer: -1``): pixels [B, 3, S, S] -> [B, patches, width]."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1]


def pretrain_vision_tower(
    tower: SiglipVisionModel, pixels: torch.Tensor, steps: int, batch_size: int = 128, learning_rate: float = 3e-3
) -> list[float]:
    """Masked autoencoding on the images alone, in place.

    Args:
        tower: Trained in place.
        pixels: Images from ``image_processor``, [N, 3, 32, 32].
        steps: Number of updates.
        batch_size: Images a step, drawn at random.
        learning_rate: Highest learning rate.

    Returns:
        The mean squared pixel error of every step (pixels in -1…1).
    """
    read_out = torch.nn.Linear(tower.config.hidden_size, 3 * PATCH * PATCH)
    side = IMAGE_SIDE // PATCH

    def loss(step: int) -> torch.Tensor:
        images = pixels[torch.randint(len(pixels), (batch_size,))]
        hidden = torch.rand(batch_size, 1, side, side) < 0.5
        hidden = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        tokens = patch_tokens(tower, images.masked_fill(hidden, 0.0))
        target = torch.nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        return torch.nn.functional.mse_loss(read_out(tokens), target)

    return optimise([tower, read_out], loss, steps, learning_rate)


def assemble_llava(
    language_model: Qwen3ForCausalLM, tower: SiglipVisionModel, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """A LLaVA with the weights of both parts and a random two-layer projector."""
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_model.config.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.vision_tower.load_state_dict(tower.state_dict())
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    llava.generation_config = language_model.generation_config
    return llava


def new_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor of ``assemble_llava``'s model: 16 image tokens an image, none besides."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )
