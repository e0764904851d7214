"""Weights for a merge, searched for by a measured loss (DeMe searches a grid by FID): deterministic, and with a record of every evaluation.

A loss is a function of a state, less is better, such as a validation loss or an FID. What was found on one split of the data is reported
on another: over many evaluations, the lowest of noisy losses is lower than it deserves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from t2i_experts.experts.merge import merge
from t2i_experts.experts.states import State

Loss = Callable[[State], float]
Weights = tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """The loss of the experts merged with some weights."""

    weights: Weights
    loss: float


Tell = Callable[[Evaluation], None]


@dataclass(frozen=True)
class MergeSearch:
    """What a search found.

    best: the lowest loss on the split that was searched on, the first of equal ones. evaluations: all, in their order, no weights twice.
    reported: losses on the other split of the root (weights of zero), of the plain average (weights of 1 / N), and of what was found.
    """

    best: Evaluation
    evaluations: tuple[Evaluation, ...]
    reported: tuple[Evaluation, Evaluation, Evaluation]


class Merges:
    """The losses of merges of some experts, each weight evaluated once. root, experts: as `merge` takes them. tell: is told each."""

    def __init__(self, root: State, experts: Sequence[State], loss: Loss, tell: Tell | None = None) -> None:
        self.root = root
        self.experts = experts
        self.loss = loss
        self.tell = tell
        self._found: dict[Weights, float] = {}

    def __call__(self, weights: Iterable[float]) -> float:
        """The loss with these weights."""
        key = tuple(float(weight) for weight in weights)
        if key not in self._found:
            self._found[key] = float(self.loss(merge(self.root, self.experts, key)))
            if self.tell is not None:
                self.tell(Evaluation(key, self._found[key]))
        return self._found[key]

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All of them, in the order in which they were made."""
        return tuple(itertools.starmap(Evaluation, self._found.items()))

    @property
    def best(self) -> Evaluation:
        """The lowest loss, the first of equal ones. A loss that is not a number is never the best of several."""
        return min(self.evaluations, key=lambda evaluation: (evaluation.loss != evaluation.loss, evaluation.loss))

    def report(self, held_out: Loss) -> MergeSearch:
        """What the search came to. held_out: the loss on a split that was not searched on."""
        count = len(self.experts)
        rows = [(0.0,) * count, (1 / count,) * count, self.best.weights]
        root, average, found = (Evaluation(row, Merges(self.root, self.experts, held_out)(row)) for row in rows)
        return MergeSearch(self.best, self.evaluations, (root, average, found))


def search_grid(root: State, experts: Sequence[State], loss: Loss, held_out: Loss, values: Sequence[float]) -> MergeSearch:
    """Every combination of `values`: len(values)^N evaluations for N experts, and two for the root and the plain average."""
    merges = _begun(root, experts, loss)
    for weights in itertools.product(values, repeat=len(experts)):
        merges(weights)
    return merges.report(held_out)


def search_coordinates(
    root: State,
    experts: Sequence[State],
    loss: Loss,
    held_out: Loss,
    *,
    step: float = 0.25,
    smallest_step: float = 0.03125,
    evaluations: int = 200,
    tell: Tell | None = None,
) -> MergeSearch:
    """From the root or the plain average, whichever is better, one weight after another a step up or down, as long as that helps.

    When no weight can be improved, the step is halved, down to `smallest_step`. At most `evaluations` are made, the first two included;
    each is told to `tell` as it is made.

    Raises ValueError unless 0 < smallest_step <= step and evaluations >= 2.
    """
    if not 0 < smallest_step <= step:
        raise ValueError(f"step={step}, smallest_step={smallest_step} must satisfy 0 < smallest_step <= step")
    if evaluations < 2:
        raise ValueError(f"evaluations={evaluations} must be >= 2: the root and the plain average are measured first")
    merges = _begun(root, experts, loss, tell)
    while step >= smallest_step:
        at = merges.best
        for weights in _neighbours(at.weights, step):
            if len(merges.evaluations) >= evaluations:
                return merges.report(held_out)
            if merges(weights) < at.loss:
                break
        else:
            step /= 2
    return merges.report(held_out)


def _begun(root: State, experts: Sequence[State], loss: Loss, tell: Tell | None = None) -> Merges:
    if not experts:
        raise ValueError("there are no experts to merge")
    merges = Merges(root, experts, loss, tell)
    merges([0.0] * len(experts))
    merges([1 / len(experts)] * len(experts))
    return merges


def _neighbours(weights: Weights, step: float) -> Iterator[Weights]:
    for i, direction in itertools.product(range(len(weights)), (1, -1)):
        yield (*weights[:i], weights[i] + direction * step, *weights[i + 1 :])
