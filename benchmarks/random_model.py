"""Makes a full-size LLaVA and DINOv2-L with random weights, so that ``overhead.py`` can measure realistic costs.

    python recipes/demo
    python benchmarks/random_model.py qwen3_4b hera_demo random_4b [--layers N] [--device cuda]

The vision encoder is as large as the paper's, with 729 tokens per image. The tokenizer comes from the demo.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers as tf

from llamafactory_hera.backbones.table import LANGUAGE_MODELS

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.backbones.full_size import VISION, vlm_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=LANGUAGE_MODELS)
    parser.add_argument("demo", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: all)")
    parser.add_argument("--device", default="cpu", help="device on which the weights are drawn")
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = tf.AutoProcessor.from_pretrained(options.demo / "model")
    tokenizer, side = processor.tokenizer, VISION["image_size"]
    content = vlm_config(options.backbone)
    content["image_token_index"] = tokenizer.convert_tokens_to_ids(processor.image_token)
    text = content["text_config"]
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if options.layers is not None:
        text["num_hidden_layers"] = options.layers
        text.pop("layer_types", None)
    with torch.device(options.device):
        model = tf.AutoModelForImageTextToText.from_config(tf.AutoConfig.for_model(**content), dtype=torch.bfloat16)
    model.save_pretrained(options.output / "model")
    processor.image_processor = tf.SiglipImageProcessor(size={"height": side, "width": side})
    processor.patch_size = VISION["patch_size"]
    processor.save_pretrained(options.output / "model")
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    teacher = tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=518, patch_size=14))
    teacher.save_pretrained(options.output / "teacher")
    image_processor = tf.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    image_processor.save_pretrained(options.output / "teacher")


if __name__ == "__main__":
    main()
