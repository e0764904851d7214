"""Precision and recall of generated pictures by nearest neighbours (Kynkaanniemi et al., arXiv 1904.06991, section 2).

Around each image of a set lies a ball that reaches to its k-th nearest neighbour in that set. Precision is the share of generated images
that lie in some ball of the reference: how many look real. Recall is the share of the reference that lies in some ball of the generated
images: how much of the variety is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_experts.evaluation.statistics import checked_pair

_ROWS = 2048  # whose distances to all others are in memory at a time


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]. neighbours: the k of the k-th nearest neighbour."""

    precision: float
    recall: float
    neighbours: int


def precision_recall(generated: Tensor, reference: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """generated: (N, D), reference: (M, D) features. Raises ValueError if they are not such a pair or not more than `neighbours` each."""
    checked_pair(generated, reference)
    if neighbours < 1 or min(len(generated), len(reference)) <= neighbours:
        raise ValueError(
            f"{len(generated)} and {len(reference)} images: with {neighbours} neighbours, at least {neighbours + 1} are needed"
        )
    middle = reference.double().mean(0)  # distances are made of squares, which lose their digits far from zero
    generated, reference = ((features.double() - middle).float() for features in (generated, reference))
    precision = _share_inside(generated, reference, _radii(reference, neighbours))
    recall = _share_inside(reference, generated, _radii(generated, neighbours))
    return PrecisionRecall(precision, recall, neighbours)


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """(N,) distance of each of (N, D) features to its k-th nearest neighbour; the nearest of all is the image itself."""
    return torch.cat([torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(_ROWS)])


def _share_inside(features: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the features that lie in some ball."""
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in features.split(_ROWS)]
    return float(torch.cat(inside).double().mean())
