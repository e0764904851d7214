"""Experts trained as low-rank differences (Hu et al. 2106.09685): the root's matrices stay, and two small factors of each are trained."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2i_experts.experts.lowrank import Factors, LowRankDifference
from t2i_experts.experts.states import State, fingerprint, refuse_misfit

_ORIGINAL, _UP, _DOWN = (f".parametrizations.weight.{part}" for part in ("original", "0.up", "0.down"))


class LowRank(nn.Module):
    """A weight W_root + up @ down, at first W_root. up: (out, rank), zeros; down: (rank, in), Gaussian of variance 1 / in."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight.flatten(1).shape
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        self.down = nn.Parameter(torch.randn_like(weight.new_empty(rank, inputs)) / math.sqrt(inputs))

    def forward(self, root: Tensor) -> Tensor:
        """root: (out, in, ...). Returns the weight, of the same shape and type; the difference is not rounded by autocast."""
        with contextlib.nullcontext() if root.is_meta else torch.autocast(root.device.type, enabled=False):
            return root + (self.up @ self.down).view_as(root)


def add_low_rank(network: nn.Module, rank: int) -> None:
    """Makes the weight of each linear layer and convolution, in place, a `LowRank` around what it is now, which no longer trains.

    What is no matrix, and matrices that are smaller than their factors would be, train whole. `low_rank_difference` says what came of it.

    Raises ValueError for rank < 1, and for a network in which no matrix is larger than its factors.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1")
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and _is_smaller(m.weight, rank)]
    if not layers:
        raise ValueError(f"rank={rank}: no matrix of the network is larger than its factors would be")
    for layer in layers:
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def low_rank_difference(state: State, root: State) -> LowRankDifference:
    """The difference that was trained.

    state: of a network after `add_low_rank`, or of an average of such networks. root: of the same network before it.

    Raises ValueError naming the first tensor for a state that does not fit, or in which the root's matrices have changed.
    """
    difference, fixed = trained_difference(state, fingerprint(root)), _fixed(state)
    refuse_misfit(root, {**fixed, **difference.whole}, "the trained network")
    for name, tensor in fixed.items():
        if not torch.equal(tensor, root[name].to(tensor)):
            raise ValueError(f"{name} was trained from another root: its fixed part differs from the root's")
    whole = {name: tensor for name, tensor in difference.whole.items() if not torch.equal(tensor, root[name].to(tensor))}
    return replace(difference, whole=whole)


def trained_difference(state: State, root: str) -> LowRankDifference:
    """The difference in a state as in `low_rank_difference`, from a root of which only the fingerprint is known.

    What is no factor is stored whole, whether it has changed or not.
    """
    names = _layers(state)
    factors = {f"{name}.weight": Factors(state[name + _UP].detach().clone(), state[name + _DOWN].detach().clone()) for name in names}
    parts = {name + part for name in names for part in (_ORIGINAL, _UP, _DOWN)}
    whole = {name: tensor.detach().clone() for name, tensor in state.items() if name not in parts}
    return LowRankDifference(root, factors, whole)


def plain_state(state: State) -> dict[str, Tensor]:
    """The state of the ordinary network with the same weights, as `restore` computes them; any other state as it is."""
    difference = trained_difference(state, "")
    return {name: difference.tensor(name, tensor).detach() for name, tensor in {**_fixed(state), **difference.whole}.items()}


def _fixed(state: State) -> dict[str, Tensor]:
    """The root's matrices, by the names that they have in the root."""
    return {name + ".weight": state[name + _ORIGINAL] for name in _layers(state)}


def _layers(state: State) -> list[str]:
    """The layers of low rank; other parametrisations are none of ours."""
    return [name.removesuffix(_UP) for name in state if name.endswith(_UP)]


def _is_smaller(weight: Tensor, rank: int) -> bool:
    outputs, inputs = weight.flatten(1).shape
    return rank * (outputs + inputs) < outputs * inputs
