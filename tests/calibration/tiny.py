"""A calibration in miniature: tiny VLMs of real classes, noise images, and random text around the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.run import CalibrationInputs
from llamafactory_hera.selection.samples import Features
from tests.tiny_models import IMAGE, PAD, VISION_END, VISION_START, vlm

LAYERS, HEADS, HEAD_DIM = 4, 8, 8
N_IMAGE, _SIDE = 4, 16


def noise_images(n: int) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)) for _ in range(n)]


class Rows:
    """A dataset in memory, with a random text for the images of each row."""

    def __init__(self, images: Sequence[list[Image.Image]]) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = [5 + row % 4 for row in range(len(images))]
        self._images = images
        self._text = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in lengths]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, row: int) -> list[Image.Image]:
        return self._images[row]

    def encode(self, row: int) -> Features | None:
        images, (first, *rest) = self._images[row], self._text[row]
        ids = [first, *[VISION_START, *[IMAGE] * N_IMAGE, VISION_END] * len(images), *rest]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "images": list(images)}


def features(n: int) -> list[Features]:
    rows = Rows([[image] for image in noise_images(n)])
    return [rows.encode(row) for row in range(n)]


def collate(rows: list[Features]) -> dict[str, Any]:
    longest = max(len(row["input_ids"]) for row in rows)
    pixels = [np.asarray(image.convert("RGB")) for row in rows for image in row["images"]]

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    return {
        "input_ids": padded("input_ids", PAD),
        "attention_mask": padded("attention_mask", 0),
        "pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1,
    }


def calibration_model(name: str = "llava-llama") -> nn.Module:
    """A VLM with enough heads for percentiles; only in ``llava-llama``, two heads do not share a value block."""
    n_kv_heads = HEADS if name == "llava-llama" else HEADS // 2
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": n_kv_heads}
    return vlm(name, **shape, head_dim=HEAD_DIM).eval()


def inputs(model: nn.Module) -> CalibrationInputs:
    """A loaded model, with 24 samples of one image each."""
    return CalibrationInputs(
        source=Rows([[image] for image in noise_images(24)]),
        load_model=lambda: model,
        collator=lambda _: collate,
        model_name="tiny/model",
        dataset_name="noise",
    )


def random_profile() -> Profile:
    """A profile of ``calibration_model`` with random measurements."""
    return Profile(torch.rand(LAYERS, HEADS).double(), torch.rand(LAYERS, HEADS, 5), torch.randn(6, LAYERS, HEADS))
