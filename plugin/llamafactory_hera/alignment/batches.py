"""Batches of neighbors: an order of a dataset whose consecutive batches hold groups of true neighbors.

In a small random batch the teacher's nearest samples are hardly alike, and the loss asks for neighbors that are none.
Here each batch is filled with a few groups of samples that the teacher finds alike: in a group lie a sample's
neighbors, in the batch's other groups those that they are told from. A trainer walks one sequence of rows and deals
it out to its processes in consecutive batches, so that an order is all that is needed: what is compared at once is a
slice of it. The order is drawn by seed and epoch. It is cut into pools of some thousand samples, within which
neighbors are exact, so that time and memory grow with the dataset, not with its square; they are found as the order
is walked, pool by pool. Every process finds the same: similarities are computed in float64 and rounded, which hides in
what order a machine adds up. **(ours)**
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from .neighbors import SAME_IMAGE, similarity

#: Samples with an image among which neighbors are looked for; a batch may be larger.
POOL = 4096
#: The smallest batch with a group of two and another one beside it.
LEAST_GROUPED = 3


@dataclass(eq=False)
class NeighborSampler(Sampler[int]):
    """Every row of a dataset once an epoch, so that each ``batch_size`` of them are groups of neighbors.

    A group is a sample with up to ``k`` of its nearest among those of its pool that have no place yet; at most half of
    a batch's other samples, so that a batch has two groups at least. Its members show different images. Which groups
    share a batch is random, and so is the order within a batch. Rows without an image are spread evenly.
    """

    shown: NDArray[np.bool_]  #: ``[N]``, which rows have an image; one at least.
    features_of: Callable[[NDArray[np.intp]], Tensor]  #: From rows to the teacher's features of them, ``[n, D]``.
    batch_size: int  #: Samples that are compared with one another.
    k: int  #: Neighbors per sample.
    normalize: bool = True  #: Cosine similarity when true, dot product otherwise.
    seed: int = 0
    epoch: int = 0  #: Each has an order of its own.

    def set_epoch(self, epoch: int) -> None:
        """Names the epoch of the next walk."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.shown)

    def __iter__(self) -> Iterator[int]:
        rng, n = np.random.default_rng([self.seed, self.epoch]), len(self)
        with_image, without = (rng.permutation(np.flatnonzero(rows)) for rows in (self.shown, ~self.shown))
        edges = np.append(np.arange(0, n, self.batch_size), n)  # of batches
        images = edges * len(with_image) // n  # samples with an image in front of each
        texts, n_batches = edges - images, len(edges) - 1
        for pool in np.array_split(np.arange(n_batches), min(n_batches, -(-len(with_image) // POOL))):
            rows = with_image[images[pool[0]] : images[pool[-1] + 1]]
            counts = np.diff(images)[pool].tolist()
            batches = _groups(self.features_of(rows), counts, self.k, self.normalize, rng)
            for batch, members in zip(pool, batches, strict=True):
                rest = without[texts[batch] : texts[batch + 1]]
                yield from rng.permutation(np.concatenate([rows[members], rest])).tolist()


def _groups(features: Tensor, counts: list[int], k: int, normalize: bool, rng: np.random.Generator) -> list[list[int]]:
    """Deals a pool's samples ``[n, D]``, in random order, out to batches of so many, as groups of neighbors."""
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
