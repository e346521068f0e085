"""Inputs of a small calibration: tiny VLMs of real classes, noise images, and random text next to each image."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.run import CalibrationInputs
from llamafactory_hera.selection.samples import Features
from tests.selection.tiny import Rows, pad_right
from tests.tiny_models import IMAGE, VISION_END, VISION_START, noise_images, vlm

LAYERS, HEADS, HEAD_DIM = 4, 8, 8
N_IMAGE = 4


def rows_of(images: list[list[Image.Image]]) -> Rows:
    """Makes a dataset in memory, with random text for the images of each row."""
    generator, features = torch.Generator().manual_seed(0), []
    for row, each in enumerate(images):
        first, *rest = torch.randint(3, 50, (5 + row % 4,), generator=generator).tolist()
        ids = [first, *[VISION_START, *[IMAGE] * N_IMAGE, VISION_END] * len(each), *rest]
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "images": each})
    return Rows(images, features)


def features(n: int) -> list[Features]:
    rows = rows_of([[image] for image in noise_images(n)])
    return [rows.encode(row) for row in range(n)]


def collate(rows: list[Features]) -> dict[str, Any]:
    pixels = torch.stack([torch.from_numpy(np.array(image)) for row in rows for image in row["images"]])
    text = pad_right([{**row, "labels": row["input_ids"]} for row in rows])
    del text["labels"]
    return text | {"pixel_values": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1}


def calibration_model(name: str = "llava-llama") -> nn.Module:
    """Makes a VLM with enough heads for percentiles; two heads share a value block, except in ``llava-llama``."""
    n_kv_heads = HEADS if name == "llava-llama" else HEADS // 2
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": n_kv_heads}
    return vlm(name, **shape, head_dim=HEAD_DIM).eval()


def inputs(model: nn.Module) -> CalibrationInputs:
    """Combines a loaded model with 24 samples of one image each."""
    return CalibrationInputs(
        source=rows_of([[image] for image in noise_images(24)]),
        load_model=lambda: model,
        collator=lambda _: collate,
        model_name="tiny/model",
        dataset_name="noise",
    )


def random_profile() -> Profile:
    """Makes a profile of ``calibration_model`` with random measurements."""
    return Profile(torch.rand(LAYERS, HEADS).double(), torch.rand(LAYERS, HEADS, 5), torch.randn(6, LAYERS, HEADS))
