"""Aspect-ratio buckets: every global batch holds pictures of one shape, so that less of them is cut away (NovelAI, 2022).

A picture belongs to the bucket whose aspect ratio is nearest to its own, by the ratio of the two. Each bucket has an order of its own,
without end, which is cut into global batches, and every global batch of the run is the next one of some bucket. To find of which,
bucket b with n_b of the N samples gets a batch due in each interval [j, j + 1) N / n_b of time, at a pseudo-random moment (stratified
sampling), and the run's batches are those of all buckets in the order of these moments. Like the order without buckets this is a pure
function of (dataset, seed, position), and here also of the buckets and the batch size; and any position is reached at once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t2i_experts.shards.order import GlobalOrder

_MOMENTS_BITS = 32


@dataclass(frozen=True)
class Buckets:
    """shapes: (width, height) of each bucket, in pixels. batch_size: of a global batch, over all processes and accumulation steps."""

    shapes: tuple[tuple[int, int], ...]
    batch_size: int

    def __post_init__(self) -> None:
        ratios = {width / height for width, height in self.shapes}
        if not self.shapes or len(ratios) < len(self.shapes) or self.batch_size < 1:
            raise ValueError(
                f"buckets {self.shapes} must be at least one, of different aspect ratios; batch_size={self.batch_size} positive"
            )


def nearest_bucket(sizes: NDArray[np.integer], shapes: Sequence[tuple[int, int]]) -> NDArray[np.int16]:
    """The number of the shape with the nearest aspect ratio for each of the pictures, (N, 2) width and height; (0, 0) counts as a square.

    Nearest by |log(ratio / ratio)|, so a picture and the same on its side are treated alike; half-way, the narrower one.
    """
    width, height = np.maximum(sizes, 1).astype(np.float64).T
    ascending = sorted(range(len(shapes)), key=lambda i: shapes[i][0] / shapes[i][1])
    nearest = np.zeros(len(sizes), np.int64)
    for i, j in itertools.pairwise(ascending):
        (w1, h1), (w2, h2) = shapes[i], shapes[j]
        nearest += width * width * (h1 * h2) > height * height * (w1 * w2)  # no logarithm: the same on every machine
    return np.array(ascending, np.int16)[nearest]


class BucketOrder:
    """order[position] is the index of the sample at that position, as of `GlobalOrder`; one bucket's in each global batch."""

    def __init__(self, bucket_of: NDArray[np.integer], buckets: Buckets, dataset_hash: str, seed: int) -> None:
        """bucket_of: the number of the bucket of each sample. Raises ValueError if there are no samples."""
        self.batch_size = buckets.batch_size
        self.samples = len(bucket_of)
        if not self.samples:
            raise ValueError("samples=0: an order needs at least one")
        self._name = f"{dataset_hash}/{seed}"
        self._members = [
            np.flatnonzero(bucket_of == b).astype(np.int32 if self.samples < 2**31 else np.int64) for b in range(len(buckets.shapes))
        ]
        self._orders = {
            b: GlobalOrder(len(members), f"{dataset_hash}/{'x'.join(map(str, buckets.shapes[b]))}", seed)
            for b, members in enumerate(self._members)
            if len(members)
        }
        self._latest = (-1, (0, 0))

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position >= 0. Raises IndexError for a negative one."""
        batch, place = divmod(position, self.batch_size)
        bucket, own = self.batch(batch)
        return int(self._members[bucket][self._orders[bucket][own * self.batch_size + place]])

    def substitute(self, position: int, attempt: int) -> int:
        """As `GlobalOrder.substitute`, drawn evenly from the bucket of the position's batch."""
        bucket, _ = self.batch(position // self.batch_size)
        return int(self._members[bucket][self._orders[bucket].substitute(position, attempt)])

    def batch(self, number: int) -> tuple[int, int]:
        """(bucket, how many batches of this bucket came before) of a global batch. Raises IndexError for a negative number."""
        if number < 0:
            raise IndexError(f"batch {number} is negative")
        if self._latest[0] != number:
            self._latest = number, self._find(number)
        return self._latest[1]

    def _find(self, number: int) -> tuple[int, int]:
        """Sorts the batches that are due about time `number`, of which one unit passes for each batch.

        By a whole time t, bucket b has had floor(t n_b / N) batches or one more, so all buckets together between t - K and t + K
        of them, K the number of buckets: the batch sought is due in [number - K, number + K + 1].
        """
        count = len(self._orders)
        due: list[tuple[int, int, int]] = []
        before = 0
        for bucket, order in self._orders.items():
            first = max(0, number - count) * order.samples // self.samples
            last = (number + count + 1) * order.samples // self.samples
            before += first
            due += [(self._moment(bucket, own), bucket, own) for own in range(first, last + 1)]
        _, bucket, own = sorted(due)[number - before]
        return bucket, own

    def _moment(self, bucket: int, own: int) -> int:
        """When a bucket's own-th batch is due, in 2^-32 of the unit of time."""
        digest = hashlib.blake2b(f"{self._name}/bucket {bucket} batch {own}".encode(), digest_size=_MOMENTS_BITS // 8).digest()
        return ((own << _MOMENTS_BITS) + int.from_bytes(digest, "little")) * self.samples // len(self._members[bucket])
