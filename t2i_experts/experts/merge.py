"""Experts merged into one network by task vectors: theta + sum_i w_i (theta_i - theta) (DeMe, Xie et al. 2410.06664).

The experts theta_i were fine-tuned from the root theta, each on its own noise. The merged network costs what one network costs, in memory
too. How much of each difference it takes is searched for: see `merge_search.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2i_experts.experts.states import State, refuse_misfit


def merge(root: State, experts: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weights root + sum_i weights[i] (experts[i] - root), in the root's types and on its devices.

    Computed tensor by tensor as (1 - sum_i w_i) root + sum_i w_i expert_i in float64, where terms with the coefficient 0 are left out, and
    rounded once: the root bit for bit for weights of zero, and one expert bit for bit if its weight is 1 and the others' are 0. (As
    root + (expert - root), float arithmetic would lose what is small beside the root.)

    Tensors that are not floating point must be equal in all states.

    Raises ValueError naming the first tensor of a state that does not fit the root, and for weights that are not one finite number for
    each expert.
    """
    if len(weights) != len(experts):
        raise ValueError(f"weights={list(weights)}: there are {len(weights)} for {len(experts)} experts; give each expert one")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)} must be finite")
    for number, expert in enumerate(experts):
        refuse_misfit(root, expert, f"expert {number}")
    coefficients = [math.fsum([1.0, *(-weight for weight in weights)]), *weights]
    return {name: _combine(name, [root[name], *(expert[name] for expert in experts)], coefficients) for name in root}


@torch.no_grad()
def _combine(name: str, tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """One tensor of the merged state; the first of `tensors` is the root's."""
    root = tensors[0]
    if not root.is_floating_point():
        if any(not torch.equal(root, tensor.to(root.device)) for tensor in tensors[1:]):
            raise ValueError(f"{name} is {root.dtype} and differs between the states: it cannot be merged")
        return root.clone()
    terms = [tensor.to(root.device, torch.float64) * c for tensor, c in zip(tensors, coefficients, strict=True) if c != 0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.to(root.dtype)
