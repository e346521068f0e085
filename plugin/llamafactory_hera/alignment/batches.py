"""Batches of neighbours: an order of a dataset whose consecutive batches hold groups of true neighbours.

In a small random batch the teacher's nearest samples are hardly alike, and the loss asks for neighbours that are none.
Here each batch is filled with a few groups of samples that the teacher finds alike: in a group lie a sample's
neighbours, in the batch's other groups those that they are told from. A trainer walks one sequence of rows and deals
it out to its processes in consecutive batches, so that an order is all that is needed: what is compared at once is a
slice of it. The order is drawn by seed and epoch. It is cut into pools of some thousand samples, within which
neighbours are exact, so that time and memory grow with the dataset, not with its square; they are found as the order
is walked, pool by pool. Every process finds the same: similarities are computed in float64 and rounded, which hides in
what order a machine adds up. **(ours)**
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from .neighbors import SAME_IMAGE, similarity

#: Samples with an image among which neighbours are looked for; a batch may be larger.
POOL = 4096


def neighbour_order(
    shown: NDArray[np.bool_],
    features_of: Callable[[NDArray[np.intp]], Tensor],
    batch_size: int,
    k: int,
    normalize: bool = True,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[int]:
    """Every row of a dataset once, so that each ``batch_size`` of them are groups of neighbours.

    A group is a sample with up to ``k`` of its nearest among those of its pool that have no place yet; at most half of
    a batch's other samples, so that a batch has two groups at least. Its members show different images. Which groups
    share a batch is random, and so is the order within a batch. Rows without an image are spread evenly.

    Args:
        shown: ``[N]``, which rows have an image; one at least.
        features_of: From rows to the teacher's features of their images, ``[n, D]``.
        batch_size: Samples that are compared with one another.
        k: Neighbours per sample.
        normalize: Cosine similarity when true, dot product otherwise.
        seed: Of the order.
        epoch: Each has an order of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    with_image, without = (rng.permutation(np.flatnonzero(rows)) for rows in (shown, ~shown))
    edges = np.append(np.arange(0, len(shown), batch_size), len(shown))  # of batches
    images = edges * len(with_image) // len(shown)  # samples with an image in front of each
    texts, n_batches = edges - images, len(edges) - 1
    for pool in np.array_split(np.arange(n_batches), min(n_batches, -(-len(with_image) // POOL))):
        rows = with_image[images[pool[0]] : images[pool[-1] + 1]]
        batches = _groups(features_of(rows), np.diff(images)[pool].tolist(), k, normalize, rng)
        for batch, members in zip(pool, batches, strict=True):
            rest = without[texts[batch] : texts[batch + 1]]
            yield from rng.permutation(np.concatenate([rows[members], rest])).tolist()


def _groups(features: Tensor, counts: list[int], k: int, normalize: bool, rng: np.random.Generator) -> list[list[int]]:
    """Deals a pool's samples ``[n, D]``, in random order, out to batches of so many, as groups of neighbours."""
    features = features.double()
    near = cosine = similarity(features, features).float().numpy()
    if not normalize:
        near = similarity(features, features, normalize=False).float().numpy()
    same = cosine > SAME_IMAGE
    batches: list[list[int]] = [[] for _ in counts]
    places = []  # the batch and the size of each group
    for batch, count in enumerate(counts):
        n_groups = -(-count // (min(k, max(0, count - 1) // 2) + 1))
        places += [(batch, (count + group) // n_groups) for group in range(n_groups)]
    free = np.ones(len(features), dtype=bool)
    for place in rng.permutation(len(places)):  # near the end few are left to choose from: for all batches alike
        batch, size = places[place]
        best = int(free.argmax())
        reach = np.where(free, near[best], -np.inf)
        for _ in range(size):
            if reach[best] == -np.inf:
                break  # only copies of the group's images are left
            batches[batch].append(best)
            free[best] = False
            reach[same[best]] = -np.inf
            reach[best] = -np.inf  # a feature of zeros is like none
            best = int(reach.argmax())
    left = iter(np.flatnonzero(free).tolist())
    for members, count in zip(batches, counts, strict=True):
        members += [next(left) for _ in range(count - len(members))]
    return batches


class NeighbourSampler(Sampler[int]):
    """The order of each epoch, for a DataLoader; arguments as for :func:`neighbour_order`."""

    def __init__(
        self,
        shown: NDArray[np.bool_],
        features_of: Callable[[NDArray[np.intp]], Tensor],
        batch_size: int,
        k: int,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        self._arguments, self._epoch = (shown, features_of, batch_size, k, normalize, seed), 0

    def set_epoch(self, epoch: int) -> None:
        """Names the epoch whose order the next walk takes."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._arguments[0])

    def __iter__(self) -> Iterator[int]:
        return neighbour_order(*self._arguments, self._epoch)
