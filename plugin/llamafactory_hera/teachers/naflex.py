"""SigLIP2 NaFlex models take a bag of patches of any aspect ratio; a teacher here takes square images.

Every image is resized to the square whose patch grid is the one that the model's position embeddings were learned on.
That is this project's choice: it gives all images of a batch one shape, as with the fixed-resolution encoders.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def grid_side(num_patches: int) -> int:
    """Patches along one side of the learned position grid."""
    return math.isqrt(num_patches)


def square_pixels(image: Image.Image, processor: Any, grid: int) -> Tensor:
    """Resizes an RGB image to ``grid`` x ``grid`` patches and normalises it as the model's own processor does.

    Returns:
        ``[3, grid * patch, grid * patch]``.
    """
    patch = processor.patch_size
    image = image.resize((grid * patch, grid * patch), Image.Resampling(processor.resample))
    patches = processor(images=image, do_resize=False, max_num_patches=grid * grid, return_tensors="pt")
    rows = patches["pixel_values"][0].reshape(grid, grid, patch, patch, 3)
    return rows.permute(4, 0, 2, 1, 3).reshape(3, grid * patch, grid * patch).contiguous()


def patch_inputs(pixel_values: Tensor, patch: int) -> dict[str, Tensor]:
    """Cuts square images into the model's inputs.

    Args:
        pixel_values: ``[B, 3, h, w]``.
        patch: Side of a patch in pixels.

    Returns:
        ``pixel_values [B, N, patch * patch * 3]``, ``pixel_attention_mask [B, N]``, ``spatial_shapes [B, 2]``.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    patches = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    device = pixel_values.device
    return {
        "pixel_values": patches.reshape(batch, rows * columns, patch * patch * channels),
        "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int32, device=device),
        "spatial_shapes": torch.tensor([[rows, columns]], device=device).repeat(batch, 1),
    }
