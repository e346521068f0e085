"""A whole calibration in small: real tiny VLMs, noise images, random text around the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from llamafactory_hera.calibration.profile import Profile
from llamafactory_hera.calibration.samples import CalibrationInputs
from llamafactory_hera.selection.samples import Features
from tests.tiny_models import IMAGE, PAD, VISION_END, VISION_START, vlm

N_IMAGE = 4
_SIDE = 16


def noise_images(n: int, seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed)
    return [Image.fromarray(noise.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)) for _ in range(n)]


class Rows:
    """A dataset in memory; its pixels are those of the images that a row is encoded with."""

    def __init__(self, images: list[list[Image.Image]], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._images = images
        self._text = []
        for row in range(len(images)):
            length = 5 + row % 4
            self._text.append(torch.randint(3, 50, (length,), generator=generator).tolist())

    def __len__(self) -> int:
        return len(self._images)

    def images(self, row: int) -> list[Image.Image]:
        return self._images[row]

    def encode(self, row: int, images: Sequence[Image.Image] | None = None) -> Features | None:
        images = self._images[row] if images is None else images
        first, *rest = self._text[row]
        ids = [first, *[VISION_START, *[IMAGE] * N_IMAGE, VISION_END] * len(images), *rest]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "images": list(images)}


def collate(rows: list[Features]) -> dict[str, Any]:
    longest = max(len(row["input_ids"]) for row in rows)
    pixels = [np.asarray(image.convert("RGB")) for row in rows for image in row["images"]]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
        ),
        "pixel_values": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1,
    }


def calibration_model(name: str = "llava-llama", **config: Any) -> nn.Module:
    """A VLM with heads enough for percentiles; llama is multi-head, the others share a V block between two heads."""
    shape = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    if "llama" in name:
        shape["num_key_value_heads"] = 8
    return vlm(name, **shape | config).eval()


def inputs(model: nn.Module, n: int = 24, images: list[list[Image.Image]] | None = None) -> CalibrationInputs:
    """``n`` samples with an image each, for a model that is loaded already."""
    return CalibrationInputs(
        source=Rows(images if images is not None else [[image] for image in noise_images(n)]),
        load_model=lambda: model,
        collator=lambda _: collate,
        model_name="tiny/model",
        dataset_name="noise",
    )


def random_profile() -> Profile:
    """What profiling ``calibration_model`` could have measured."""
    return Profile(torch.rand(4, 8).double(), torch.rand(4, 8, 5), torch.randn(6, 4, 8))
