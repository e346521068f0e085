"""Heads of every finished VLM are read right on its real class, with a picture through its real processor."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image

from llamafactory_hera.heads import HeadCapture
from llamafactory_hera.heads.families import decoder_layers, head_layout, output_projection

from .full_size import NATIVE
from .standins import save_native

#: What stands for a picture in the text that each processor takes.
PLACEHOLDERS = {
    "qwen2_5_vl_7b": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl_4b": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava_1_5_7b": "<image>",
    "llava_next_7b": "<image>",
    "internvl3_8b": "<IMG_CONTEXT>",
    "gemma3_4b": "<start_of_image>",
}


@pytest.mark.parametrize("key", NATIVE)
def test_a_captured_head_is_its_slice_of_the_projection(key: str, tmp_path: Path) -> None:
    folder = save_native(key, tmp_path / key)
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
    assert (model.config.model_type, model.config.get_text_config().model_type) == NATIVE[key][:2]
    processor = tf.AutoProcessor.from_pretrained(folder)
    image = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB")
    text = f"{PLACEHOLDERS[key]}What is it?"
    images = [[image], [image]] if key == "gemma3_4b" else [image, image]
    batch = dict(processor(images=images, text=[text, text], return_tensors="pt"))
    mask = torch.zeros_like(batch["input_ids"])
    mask[0, -4:], mask[1, -2:] = 1, 1

    layout = head_layout(model.config)
    inputs = {}
    handles = [
        output_projection(layer).register_forward_pre_hook(
            lambda module, args, index=index: inputs.update({index: args[0].detach()})
        )
        for index, layer in enumerate(decoder_layers(model))
    ]
    with torch.no_grad():
        plain = model(**batch).logits
    for handle in handles:
        handle.remove()
    with HeadCapture(model, "L0H3,L1H0,L1H2") as capture:
        capture.pool(mask)
        logits = model(**batch).logits
        z = capture.representations()

    for row, (layer, head) in enumerate([(0, 3), (1, 0), (1, 2)]):
        weight = output_projection(decoder_layers(model)[layer]).weight
        piece = slice(head * layout.head_dim, (head + 1) * layout.head_dim)
        for sample in range(2):
            tokens = inputs[layer][sample, mask[sample].bool(), piece]
            torch.testing.assert_close(z[row, sample], tokens.mean(dim=0) @ weight[:, piece].T, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=1e-5)
    z.sum().backward()
    assert decoder_layers(model)[0].self_attn.v_proj.weight.grad.abs().sum() > 0
