"""A LLaVA of real size with random weights, and a random DINOv2-L: what ``overhead.py`` needs to measure real sizes.

    python recipes/demo
    python tests/bench/random_model.py qwen3_4b hera_demo random_4b [--layers N] [--device cuda]
    python tests/bench/overhead.py recipes/demo/hera.yaml model_name_or_path=random_4b/model \\
        hera_teacher=random_4b/teacher hera_heads=L7H6,L13H12,L3H6,L3H5,L13H13 finetuning_type=lora lora_target=all \\
        cutoff_len=1024 per_device_train_batch_size=8 bf16=true use_cpu=false

Tokenizer and data are the demo's; sizes are those of the table of backbones (`qwen3_4b`, `qwen3_8b`, `llama3_8b`, …)
with the paper's vision encoder: 729 tokens an image. Speed and memory do not depend on the values of the weights.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers as tf

from llamafactory_hera.backbones.table import LANGUAGE_MODELS

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.backbones.full_size import VISION, vlm_config

TEACHER = tf.Dinov2Config(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
)


def save_model(key: str, processor: tf.ProcessorMixin, folder: Path, layers: int | None, device: str) -> None:
    """Writes model and processor in bf16."""
    content = vlm_config(key)
    text = content["text_config"]
    tokenizer = processor.tokenizer
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if layers is not None:
        text["num_hidden_layers"] = layers
        text.pop("layer_types", None)
    content |= {"image_token_index": tokenizer.convert_tokens_to_ids(processor.image_token)}
    config = tf.AutoConfig.for_model(**content)
    with torch.device(device):
        model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    side = VISION["image_size"]
    processor.image_processor = tf.SiglipImageProcessor(size={"height": side, "width": side})
    processor.patch_size = VISION["patch_size"]
    processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", choices=LANGUAGE_MODELS)
    parser.add_argument("demo", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers, to make it smaller")
    parser.add_argument("--device", default="cpu", help="where the weights are drawn")
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = tf.AutoProcessor.from_pretrained(options.demo / "model")
    save_model(options.backbone, processor, options.output / "model", options.layers, options.device)
    tf.Dinov2Model(TEACHER).save_pretrained(options.output / "teacher")
    image_processor = tf.BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    image_processor.save_pretrained(options.output / "teacher")


if __name__ == "__main__":
    main()
