"""The mathematics of head alignment: tensor functions that need only torch and no model."""

from .losses import cka_loss, contrastive_loss, cosine_loss
from .neighbors import chance_level, mutual_knn, nearest_neighbors
from .scoring import score_heads

__all__ = [
    "chance_level",
    "cka_loss",
    "contrastive_loss",
    "cosine_loss",
    "mutual_knn",
    "nearest_neighbors",
    "score_heads",
]
