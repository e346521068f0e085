"""What each objective adds to a training step at a real size, in floating-point operations: computed, not measured.

    python tests/bench/flops.py qwen3_8b [--text 270]

For one sample: 729 tokens of an image and some of text, stage 2 with everything but the vision tower trained and
gradient checkpointing. Counted on the meta device by torch's own counter: forward passes as they are, a backward pass
as two, a recomputation as one. The teacher is DINOv2-L, ROSS's an autoencoder of FLUX.1's shape.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from llamafactory_hera.objectives import TokenBatch, create

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.backbones.full_size import SIZES, vlm_config
from tests.terms import options

SIDE, PATCH = 27, 14
TOKENS = SIDE**2


def operations(function: Callable[[], Any]) -> float:
    """TFLOP of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e12


def teacher() -> float:
    """DINOv2-L on the student's pixels, resized to the token grid."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        model = tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=518, patch_size=PATCH))
        return operations(lambda: model(torch.empty(1, 3, SIDE * PATCH, SIDE * PATCH)))


def autoencoder() -> float:
    """The encoder alone."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    with torch.device("meta"):
        encoder = AutoencoderKL(**blocks, **widths, use_quant_conv=False, use_post_quant_conv=False).encoder
        return operations(lambda: encoder(torch.empty(1, 3, 16 * SIDE, 16 * SIDE)))


def term(name: str, n_targets: int, dim: int, head_dim: int | None = None, tokens: int = TOKENS) -> float:
    """Forward, recomputation and backward of an objective on tokens; a head's folded weights are counted, too."""
    chosen = options(n_targets, dim, 1024, side=SIDE)
    with torch.device("meta"):
        objective = create(name, chosen)
        read = torch.empty(n_targets, 1, tokens, head_dim or dim)
        projections = torch.empty(n_targets, head_dim, dim) if head_dim else None
        facts = {"places": torch.zeros(1, tokens, dtype=torch.long)}
        batch = TokenBatch(read, projections, torch.empty(1, TOKENS, 1024), torch.ones(1).bool(), facts)
        return 4 * operations(lambda: objective(batch))


def denoiser(dim: int) -> float:
    """ROSS's, on four draws."""
    with torch.device("meta"):
        objective = create("ross", options(1, dim, 64, side=SIDE))
        noisy, times = torch.empty(4, 1, TOKENS, 64), torch.zeros(4, 1, dtype=torch.long)
        return 4 * operations(lambda: objective.denoiser(noisy, times, torch.empty(1, TOKENS, dim)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=SIZES)
    parser.add_argument("--text", type=int, default=270, help="tokens of text")
    options = parser.parse_args()
    content = vlm_config(options.backbone)
    text = tf.AutoConfig.for_model(**content["text_config"])
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(text)
        tower = tf.AutoModel.from_config(tf.AutoConfig.for_model(**content["vision_config"]))
        embeds = torch.empty(1, TOKENS + options.text, text.hidden_size)
        pixels = torch.empty(1, 3, SIDE * PATCH, SIDE * PATCH)
        sft = 4 * operations(lambda: model(inputs_embeds=embeds)) + operations(lambda: tower(pixels))
    dim, dinov2 = text.hidden_size, teacher()
    rows = {
        "the teacher alone, of which a cache spares the run": dinov2,
        "feature, a layer; viral": dinov2 + term("viral", 1, dim),
        "feature, 5 heads": dinov2 + term("feature", 5, dim, text.head_dim),
        "jarvis": dinov2 + term("jarvis", 1, dim, tokens=4 * 130),
        "ross": autoencoder() + denoiser(dim),
    }
    print(f"{options.backbone}, {TOKENS} + {options.text} tokens: SFT {sft:.1f} TFLOP a sample")
    for name, added in rows.items():
        print(f"| {name} | {added:.2f} TFLOP | {100 * added / sft:.2f} % |")


if __name__ == "__main__":
    main()
