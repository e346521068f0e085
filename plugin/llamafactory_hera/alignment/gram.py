"""Similarities of head contributions without vectors of the model's size, and how far to trust them.

With ``c_i = W o_i`` (paper, eq. 7), ``<c_i, c_j> = o_iᵀ (WᵀW) o_j``: the ``[d, d]`` Gram matrix of a head's projection
replaces every ``D``-sized vector. It is used as it stands (``o_i`` on one side, ``WᵀW o_j`` on the other), because a
Cholesky factor would not exist for a projection without full column rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of the projection that are multiplied at a time: few enough to be still in the cache when they are, and to keep
# the fp32 copy of half-precision weights small.
GRAM_ROWS = 128
# Squared norms outside this range have lost digits to underflow or overflow in fp32.
_SQUARE_RANGE = (1e-30, 1e30)
# |W o|² below this many units of rounding of |W|² |o|² is zero: o lies in the null space of W.
_VANISHING = 64


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in true fp32: no autocast, no TF32, no bf16 emulation, whatever the caller has switched on."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    per_backend = all(hasattr(backend, "fp32_precision") for backend in backends)
    if per_backend:
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if per_backend:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(before)


def head_grams(weight: Tensor, n_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``WᵀW`` of each head's columns of an output projection.

    Args:
        weight: ``o_proj.weight``, ``[D, H * d]``, any float type.
        n_heads: ``H``, query heads.
        dtype: Type to multiply in.

    Returns:
        ``[H, d, d]``.
    """
    d = weight.shape[1] // n_heads
    half = d // 2
    # The upper right quarter is the lower left one, transposed: it is not computed.
    left = torch.zeros(n_heads, d, half, dtype=dtype, device=weight.device)
    corner = torch.zeros(n_heads, d - half, d - half, dtype=dtype, device=weight.device)
    for rows in weight.split(GRAM_ROWS):
        columns = rows.to(dtype).view(-1, n_heads, d).transpose(0, 1).contiguous()
        left.baddbmm_(columns.mT, columns[..., :half])
        corner.baddbmm_(columns[..., half:].mT, columns[..., half:])
    right = torch.cat([left[:, half:].mT, corner], dim=1)
    return torch.cat([left, right], dim=2)


@dataclass(frozen=True)
class Factors:
    """Two sides whose product ``queries @ keysᵀ`` is the similarity matrix, for ``B`` heads at once.

    Attributes:
        queries: ``[B, N, d]``.
        keys: ``[B, N, d]``.
        rounding: ``[B, N]``; the similarity of ``i`` and ``j`` is off by at most the larger of their two values.
        sound: ``[B]``, whether that bound can be trusted for the head. False where a value is not finite, where a norm
            under- or overflows, and where a contribution is zero up to rounding.
    """

    queries: Tensor
    keys: Tensor
    rounding: Tensor
    sound: Tensor


def similarity_factors(features: Tensor, gram: Tensor | None, normalize: bool) -> Factors:
    """Factors of the similarity matrix of ``B`` sets of features.

    Args:
        features: ``[B, N, d]``, fp32 or fp64 (the type of the result). Overwritten when it is to be normalised.
        gram: ``[B, d, d]`` of the map that features go through before they are compared; None compares them directly.
        normalize: Cosine similarity when true, dot product otherwise.
    """
    d = features.shape[-1]
    eps = torch.finfo(features.dtype).eps
    squares = torch.linalg.vector_norm(features, dim=-1).square()
    if gram is None:
        keys, scale = features, features.new_ones(features.shape[0])
        image_squares = squares
    else:
        keys = torch.bmm(features, gram)
        # The largest absolute row sum bounds the spectral norm of a symmetric matrix.
        scale = gram.abs().sum(-1).amax(-1)
        image_squares = torch.linalg.vecdot(features, keys)
    reach_squares = scale[:, None] * squares
    vanishing = image_squares <= _VANISHING * eps * reach_squares
    low, high = _SQUARE_RANGE
    sound = ((image_squares > low) & (image_squares < high) & (reach_squares < high) & ~vanishing).all(-1)

    length_squares = image_squares
    if normalize:
        inverse = image_squares.rsqrt().masked_fill_(vanishing, 0.0)
        features.mul_(inverse[..., None])
        if gram is not None:
            keys.mul_(inverse[..., None])
        reach_squares = reach_squares * inverse.square()
        length_squares = torch.ones_like(inverse)
    # Two sources of error: the sums of d products, and the Gram matrix, whose error grows with |W|² |o_i|² / |W o_i|².
    # The bound is 1.5 to 3 times the largest error seen over random, skewed, low-rank and nearly constant features, d
    # from 64 to 8192.
    rounding = eps * ((8 + d**0.5 / 2) * length_squares + reach_squares)
    return Factors(features, keys, rounding, sound)
