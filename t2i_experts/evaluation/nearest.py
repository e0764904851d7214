"""Of many pictures, the nearest in a set of any size that streams by: exact, whatever the order and the batches.

|a|^2 + |b|^2 - 2ab by matrix products is fast, but its rounding hides just what is looked for, copies: in float32 it says 1e-3 where the
distance is 0. Here it only leaves out what its error bound allows to leave out; of the rest, differences are taken, squared and summed in
float64. Of training pictures at the same distance, the first in their set's order counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_QUERIES = 4096  # whose products with a batch are in memory at a time
_ELEMENTS = 2**23  # of differences in float64 that are in memory at a time
_ROUNDING = 2.0**-24  # of a float32


class NearestSearch:
    """The nearest of what was added so far, for each of N pictures.

    queries: (N, T, D) float32, T parts of D features each; the distance of two pictures is the greatest Euclidean one of their parts.
    """

    def __init__(self, queries: Tensor, device: torch.device | str = "cpu") -> None:
        self._device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)  # MPS knows no float64
        self._queries = queries.to(self._device)
        self._centre = self._queries.mean(0) if len(queries) else self._queries.new_zeros(queries.shape[1:])
        self._centred = self._queries - self._centre
        self._norms = self._centred.square().sum(-1)
        self._bound = 2 * (queries.shape[2] + 4) * _ROUNDING
        """Of the error of a squared distance by products, as a share of both squared norms."""
        self.distances = np.full(len(queries), np.inf, np.float32)
        self.indices = np.full(len(queries), -1, np.int64)

    def add(self, features: Tensor, indices: Sequence[int]) -> None:
        """features: (B, T, D) float32 of some pictures, finite. indices: theirs in their set. Raises ValueError for another shape."""
        if features.shape[1:] != self._queries.shape[1:] or len(features) != len(indices):
            raise ValueError(
                f"features of shape {tuple(features.shape)} where ({len(indices)}, T, D) = (..., {self._queries.shape[1:]}) is due"
            )
        if not len(features):
            return
        features = features.to(self._device)
        centred = features - self._centre
        norms = centred.square().sum(-1)
        for start in range(0, len(self._queries), _QUERIES):
            some = slice(start, start + _QUERIES)
            low, high = self._squared(some, centred, norms)
            known = torch.from_numpy(self.distances[some]).to(self._device).double().square()
            most = torch.minimum(high.amin(1).double(), known) * (1 + 8 * _ROUNDING)  # what is as far when rounded counts as equal
            rows, columns = (low.double() <= most[:, None]).nonzero(as_tuple=True)
            self._look(rows + start, features, columns, np.asarray(indices, np.int64))

    def merge(self, distances: np.ndarray, indices: np.ndarray) -> None:
        """Takes in what another search over other pictures, with the same queries, has found: its `distances` and `indices`."""
        self._keep(np.arange(len(distances)), distances, indices)

    def _squared(self, some: slice, centred: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """(n, B) bounds from below and from above of the squared distances."""
        low = high = torch.zeros((), device=self._device)
        for part in range(centred.shape[1]):
            both = self._norms[some, part, None] + norms[None, :, part]
            squared = both - 2 * self._centred[some, part] @ centred[:, part].T
            slack = self._bound * both
            low, high = torch.maximum(low, squared - slack), torch.maximum(high, squared + slack)
        return low, high

    def _look(self, rows: Tensor, features: Tensor, columns: Tensor, indices: np.ndarray) -> None:
        """Takes the distances of query rows[i] to features[columns[i]] exactly."""
        step = max(1, _ELEMENTS // features[0].numel())
        for start in range(0, len(rows), step):
            row, column = rows[start : start + step], columns[start : start + step]
            differences = self._queries[row].double() - features[column].double()
            distances = differences.square().sum(-1).amax(-1).sqrt().float()  # rounded: sums may differ in their last bit by the batch
            self._keep(row.cpu().numpy(), distances.cpu().numpy(), indices[column.cpu().numpy()])

    def _keep(self, rows: np.ndarray, distances: np.ndarray, indices: np.ndarray) -> None:
        order = np.lexsort((indices, distances, rows))
        rows, distances, indices = rows[order], distances[order], indices[order]
        first = np.concatenate([[True], rows[1:] != rows[:-1]])[: len(rows)]
        rows, distances, indices = rows[first], distances[first], indices[first]
        old, known = self.distances[rows], self.indices[rows]
        better = (indices >= 0) & ((distances < old) | ((distances == old) & (indices < known)))
        self.distances[rows[better]], self.indices[rows[better]] = distances[better], indices[better]
