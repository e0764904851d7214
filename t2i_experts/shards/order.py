"""The order in which training sees a dataset: infinite, and a pure function of (dataset, seed, position).

Epoch e, the positions [e N, (e + 1) N), is a pseudo-random permutation of the N samples. It is computed point by point: a Feistel
network permutes the pairs (left, right) with left < a, right < b and a b >= N, and points outside [0, N) are walked over (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002). Nothing is stored or replayed, and any position is reached at once.
"""

from __future__ import annotations

import functools
import hashlib
import math
from array import array
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10


class GlobalOrder:
    """order[position] is the index of the sample at that position; positions count images seen, over all epochs."""

    def __init__(self, samples: int, dataset_hash: str, seed: int) -> None:
        """Raises ValueError if there are no samples."""
        if samples < 1:
            raise ValueError(f"samples={samples}: an order needs at least one")
        self.samples = samples
        self._name = f"{dataset_hash}/{seed}"
        self._a = math.isqrt(samples - 1) + 1
        self._b = -(-samples // self._a)

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: NDArray[np.integer]) -> NDArray[np.int64]: ...
    def __getitem__(self, position: int | NDArray[np.integer]) -> int | NDArray[np.int64]:
        """The index in [0, samples) for a position >= 0, or for each of an array of them. Raises IndexError for a negative one."""
        if (position < 0).any() if isinstance(position, np.ndarray) else position < 0:
            raise IndexError(f"position {position} is negative")
        if not isinstance(position, np.ndarray):
            epoch, point = divmod(int(position), self.samples)
            rounds = _rounds(self._name, epoch, self._a, self._b)
            point = self._encrypt(point, rounds)
            while point >= self.samples:
                point = self._encrypt(point, rounds)
            return point
        epochs, points = np.divmod(position.astype(np.int64), self.samples)
        for epoch in np.unique(epochs):
            numbers = _rounds(self._name, int(epoch), self._a, self._b)
            arrays, todo = [(np.asarray(of_right), np.asarray(of_left)) for of_right, of_left in numbers], epochs == epoch
            while todo.any():
                points[todo] = self._encrypt(points[todo], arrays)
                todo &= points >= self.samples
        return points

    def substitute(self, position: int, attempt: int) -> int:
        """The index to read instead at a position when `attempt` samples drawn for it (1 or more) could not be read.

        Drawn evenly from all samples, and like the order itself a pure function of (dataset, seed, position, attempt).
        """
        digest = hashlib.blake2b(f"{self._name}/{position}/substitute {attempt}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little") % self.samples

    def _encrypt(self, point: Any, rounds: Sequence[tuple[Any, Any]]) -> Any:
        """A permutation of [0, a b): each round adds to one half a keyed hash of the other.

        point: one or many; rounds: what `_rounds` gives, for many points as numpy's arrays.
        """
        a, b = self._a, self._b
        left, right = divmod(point, b)
        for of_right, of_left in rounds:
            left = (left + of_right[right]) % a
            right = (right + of_left[left]) % b
        return left * b + right


def _mix(x: NDArray[Any]) -> NDArray[Any]:
    """A 64-bit integer hash: splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=64)
def _rounds(name: str, epoch: int, a: int, b: int) -> tuple[tuple[array[int], array[int]], ...]:
    """What each pair of rounds adds to a left half, for every right half, and the other way round: some sqrt(N) numbers a round."""
    digest = hashlib.shake_256(f"{name}/{epoch}".encode()).digest(8 * _ROUNDS)
    keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]
    lefts, rights = np.arange(a, dtype=np.uint64), np.arange(b, dtype=np.uint64)
    return tuple((_numbers(_mix(rights ^ keys[i]) % a), _numbers(_mix(lefts ^ keys[i + 1]) % b)) for i in range(0, _ROUNDS, 2))


def _numbers(values: NDArray[Any]) -> array[int]:
    """As an array of Python's own, whose items are read several times as fast as numpy's."""
    return array("I", values.astype(np.uint32).tobytes())


def position_rng(seed: int, position: int, purpose: str) -> np.random.Generator:
    """Random numbers that belong to one position and one purpose ("caption", "crop", ...), whatever was drawn before or elsewhere."""
    counter = np.array([0, 0, 0, position], np.uint64)  # draws count up from the lowest word
    return np.random.Generator(np.random.Philox(key=_philox_key(seed, purpose), counter=counter))


class PositionDraws:
    """What `position_rng` gives, for draws that are made at once: one generator, put to each position in turn."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._bits = np.random.Philox(key=_philox_key(seed, purpose), counter=0)
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, position: int) -> np.random.Generator:
        """The generator of a position, until the next one is asked for."""
        self._start["state"]["counter"][3] = position
        self._bits.state = self._start
        return self._generator


@functools.lru_cache(maxsize=64)
def _philox_key(seed: int, purpose: str) -> NDArray[np.uint64]:
    return np.frombuffer(hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=16).digest(), "<u8")
