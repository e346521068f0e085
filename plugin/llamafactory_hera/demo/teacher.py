"""The demo's teacher: a tiny DINOv2-class vision transformer, self-supervised on the training images alone.

SimCLR (arXiv 2002.05709): two random views of an image must find each other among the views of the other images of the
batch, by the cosine of their CLS tokens behind a two-layer head, which is thrown away afterwards. Views differ in
place, scale, brightness, contrast, colour cast and noise. They are never mirrored, and colours keep their names: left
and right, and colour, are things that the captions speak of. No text, label or scene factor is used.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from .training import optimise

IMAGE_SIDE = 32
PATCH = 8
TEMPERATURE = 0.1


def image_processor() -> BitImageProcessor:
    """DINOv2's own processing at 32×32 pixels."""
    return BitImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def new_teacher() -> Dinov2Model:
    """Three layers of width 64 with random weights; a CLS token and 16 patch tokens."""
    config = Dinov2Config(
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2,
    )
    return Dinov2Model(config)


def random_view(pixels: torch.Tensor) -> torch.Tensor:
    """One random view of every image: [B, 3, S, S] -> [B, 3, S, S], normalised pixels."""
    count = len(pixels)
    scale = torch.empty(count, 1).uniform_(0.85, 1.15)
    shift = torch.empty(count, 2).uniform_(-0.15, 0.15)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale[:, 0]
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    view = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.8, 1.2)
    cast = torch.empty(count, 3, 1, 1).uniform_(-0.2, 0.2) + torch.empty(count, 1, 1, 1).uniform_(-0.3, 0.3)
    return view * contrast + cast + 0.05 * torch.randn_like(view)


def train_teacher(
    teacher: Dinov2Model,
    pixels: torch.Tensor,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    view: Callable[[torch.Tensor], torch.Tensor] = random_view,
) -> list[float]:
    """Contrastive training on the images alone, in place.

    Args:
        teacher: Trained in place.
        pixels: Images from ``image_processor``, [N, 3, 32, 32].
        steps: Number of updates.
        batch_size: Images a step, all different; at most N.
        learning_rate: Highest learning rate.
        view: From normalised pixels to one random view of every image.

    Returns:
        The InfoNCE loss of every step, in nats.
    """
    width = teacher.config.hidden_size
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width))
    batch_size = min(batch_size, len(pixels))
    partners = torch.arange(2 * batch_size).roll(batch_size)

    def loss(step: int) -> torch.Tensor:
        images = pixels[torch.randperm(len(pixels))[:batch_size]]
        views = torch.cat([view(images), view(images)])
        vectors = F.normalize(head(teacher(views).last_hidden_state[:, 0]), dim=-1)
        similarity = (vectors @ vectors.T / TEMPERATURE).fill_diagonal_(float("-inf"))
        return F.cross_entropy(similarity, partners)

    return optimise([teacher, head], loss, steps, learning_rate)
