"""Head alignment maths: tensors in, tensors out; knows no model and no framework beyond torch."""

from .mknn import chance_level, mutual_knn, nearest_neighbors
from .objectives import cka_loss, contrastive_loss, cosine_loss

__all__ = ["chance_level", "cka_loss", "contrastive_loss", "cosine_loss", "mutual_knn", "nearest_neighbors"]
