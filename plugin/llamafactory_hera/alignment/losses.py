"""The alignment losses: HeRA's contrastive loss on neighborhoods (paper, eq. 4 and 8), cosine, and CKA."""

import torch
from torch import Tensor

from .neighbors import similarity


def contrastive_loss(
    z: Tensor, neighbors: Tensor, temperature: Tensor | float, normalize: bool = True, allowed: Tensor | None = None
) -> Tensor:
    """Computes ``L_RA``, averaged over samples (paper, eq. 4) and, if ``z`` has several heads, over these (eq. 8).

    The loss of a sample with neighbors ``P_i`` is ``-1/|P_i| sum_{j in P_i} log softmax(s_i / temperature)_j`` over
    its candidates. Samples without a neighbor do not count.

    Args:
        z: Student representations ``[M, D]`` or ``[H, M, D]``.
        neighbors: ``[N, k]``, from ``nearest_neighbors`` with the teacher's features; -1 marks a missing neighbor.
        temperature: The softmax temperature, above 0; a tensor receives gradients if it requires them.
        normalize: True for cosine similarity, false for the dot product.
        allowed: The candidates, as for ``nearest_neighbors``.

    Returns:
        A scalar; 0 if no sample has a neighbor.
    """
    m = z.shape[-2]
    n = m if allowed is None else allowed.shape[0]
    if neighbors.dim() != 2 or neighbors.shape[0] != n:
        raise ValueError(f"neighbors: the shape {list(neighbors.shape)} does not fit {n} samples; give [{n}, k].")
    if allowed is None:
        allowed = ~torch.eye(n, dtype=torch.bool, device=z.device)
    losses, _, _ = sample_losses(similarity(z[..., :n, :], z, normalize), neighbors, temperature, allowed)
    return (losses.sum(dim=-1) / (neighbors >= 0).any(dim=-1).sum().clamp(min=1)).mean()


def sample_losses(
    similarities: Tensor, neighbors: Tensor, temperature: Tensor | float, allowed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``L_RA`` of each sample (paper, eq. 4) from its similarities ``[..., n, M]`` to all candidates.

    Returns the losses ``[..., n]`` (0 for a sample without a neighbor), the logits ``[..., n, M]``, and the logits'
    log-sum-exp ``[..., n]``.
    """
    # the fill value is finite to keep fully masked rows finite, and below all dot products
    logits = (similarities * (1 / temperature)).masked_fill_(~allowed, torch.finfo(similarities.dtype).min)
    known = neighbors >= 0
    places = neighbors.clamp(min=0).expand(*logits.shape[:-1], -1)
    positive = logits.gather(-1, places).where(known, 0.0).sum(dim=-1) / known.sum(dim=-1).clamp(min=1)
    sums = logits.logsumexp(dim=-1)
    return torch.where(known.any(dim=-1), sums - positive, 0.0), logits, sums


def cosine_loss(predicted: Tensor, goal: Tensor) -> Tensor:
    """Returns one minus the cosine similarity of vectors and goals ``[..., D]``: ``[...]``, between 0 and 2."""
    return 1 - torch.nn.functional.cosine_similarity(predicted, goal, dim=-1)


def cka_loss(z: Tensor, teacher: Tensor, enters: Tensor) -> Tensor:
    """Computes one minus the linear CKA of two sets of features.

    ``CKA = <K, L> / (|K| |L|)``, where K and L are the Gram matrices of the features, centered over samples (Kornblith
    et al. 2019, arXiv 1905.00414, eq. 3 and sec. 3). CKA is invariant to rotation and scaling of either side.

    Args:
        z: ``[..., N, D]``.
        teacher: ``[N, D_teacher]``, features of the same samples.
        enters: Boolean ``[N]``, the samples to include; the features of the others must be finite, too.

    Returns:
        ``[...]``, between 0 and 1; 1, with zero gradient, if all vectors in one set of features are equal.
    """
    ours, theirs = _centered_gram(z, enters), _centered_gram(teacher, enters)
    lengths = torch.linalg.matrix_norm(ours) * torch.linalg.matrix_norm(theirs)
    # if a length is 0, so is the inner product; dividing it by a tiny number would make its gradient overflow
    return 1 - (ours * theirs).sum(dim=(-1, -2)) / torch.where(lengths > 0, lengths, 1.0)


def _centered_gram(features: Tensor, enters: Tensor) -> Tensor:
    rows, features = enters.unsqueeze(-1), features if features.dtype == torch.float64 else features.float()
    mean = torch.where(rows, features, 0.0).sum(dim=-2, keepdim=True) / enters.sum().clamp(min=1)
    centered = torch.where(rows, features - mean, 0.0)
    return similarity(centered, centered, normalize=False)
