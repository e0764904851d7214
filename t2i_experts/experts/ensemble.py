"""An ensemble of experts (eDiff-I, 2211.01324): one denoiser that is several, each of which answers for its own range of noise."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from operator import itemgetter

import torch
from torch import Tensor

from t2i_experts.diffusion.guidance import prepare
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.interval import NoiseInterval, complement
from t2i_experts.types import Conditioning, Denoiser

Expert = tuple[NoiseInterval, Denoiser]
"""A range of noise, and who answers for it."""


class ExpertEnsemble:
    """A `Denoiser` that gives every evaluation to the expert whose interval holds its sigma.

    The choice depends on sigma alone and on no step, so that a corrector's second evaluation beyond an edge, and a multistep sampler's
    history across one, are right. One evaluation runs one network: it takes as long as with a single network.

    Args:
        experts: in any order; their intervals must partition all noise. A denoiser may answer for several of them.

    Raises ValueError, naming the range, for a gap or an overlap, and for intervals of different distributions.
    """

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts: tuple[Expert, ...] = tuple(sorted(experts, key=lambda expert: (expert[0].u_lo, expert[0].u_hi)))
        _check_partition([interval for interval, _ in self.experts])
        self.networks: tuple[Denoiser, ...] = tuple({id(denoiser): denoiser for _, denoiser in self.experts}.values())
        """Who answers, each once, in the order of the lowest noise that it answers for."""
        places = {id(denoiser): place for place, denoiser in enumerate(self.networks)}
        self._edges = [interval.sigma_hi for interval, _ in self.experts[:-1]]
        self._keys = [(self, place) for place in range(len(self.networks))]
        self._choices = [places[id(denoiser)] for _, denoiser in self.experts]

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning, with which each network's projections will be kept: for many calls with one prompt.

        A network makes them at its first evaluation, once for these rows and once for each part of them that it is given. On a GPU the
        evaluations before it are then still being computed, and nothing waits for the launches, of which there are as many as networks
        times layers. Raises ValueError for a conditioning that another denoiser has prepared.
        """
        _refuse_prepared(conditioning)
        return conditioning if conditioning.each_for_itself else replace(conditioning, each_for_itself=True)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The estimates of the experts, (B, C, H, W).

        Args:
            x: (B, C, H, W).
            sigma: 0-d, which chooses the expert without a copy from the device if it is on the CPU; or (B,): each expert evaluates, once,
                the rows that are its own, which waits for sigmas that are on another device.
            conditioning: B rows, prepared or not.

        Raises ValueError for a conditioning that another denoiser has prepared.
        """
        _refuse_prepared(conditioning)
        if sigma.ndim == 0:
            return self._evaluate(self._choices[bisect_left(self._edges, float(sigma))], x, sigma, conditioning)
        intervals = torch.bucketize(sigma.double().cpu(), torch.tensor(self._edges, dtype=torch.float64))  # (B,), edges inside the lower
        choices = torch.tensor(self._choices)[intervals]
        places = choices.unique().tolist()
        if len(places) == 1:
            return self._evaluate(places[0], x, sigma, conditioning)
        rows = [(choices == place).nonzero().flatten().to(x.device) for place in places]
        parts = [
            self._evaluate(place, x[own], sigma[own], conditioning.map(itemgetter(own))) for place, own in zip(places, rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def with_expert(self, interval: NoiseInterval, denoiser: Denoiser) -> ExpertEnsemble:
        """The ensemble in which `denoiser` answers for all of `interval`; the others keep what they have beside it."""
        others = [(left, expert) for own, expert in self.experts for left in complement([interval], own)]
        return ExpertEnsemble([*others, (interval, denoiser)])

    def map(self, function: Callable[[Denoiser], Denoiser]) -> ExpertEnsemble:
        """The ensemble with function(network) in the place of every network, called once for each."""
        images = {id(network): function(network) for network in self.networks}
        return ExpertEnsemble([(interval, images[id(denoiser)]) for interval, denoiser in self.experts])

    def _evaluate(self, place: int, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        network = self.networks[place]
        if conditioning.each_for_itself:
            conditioning = conditioning.once(self._keys[place], lambda: prepare(network, Conditioning(conditioning.embeddings)))
        return network(x, sigma, conditioning)


def _refuse_prepared(conditioning: Conditioning) -> None:
    if conditioning.projected:
        raise ValueError("the conditioning holds the projections of a single network; an ensemble's networks each need their own")


def each_network(denoiser: Denoiser, function: Callable[[Denoiser], Denoiser]) -> Denoiser:
    """function(denoiser), or the ensemble or blend with function(network) in the place of every network."""
    return denoiser.map(function) if isinstance(denoiser, (ExpertEnsemble, RatioBlend)) else function(denoiser)


def _check_partition(intervals: Sequence[NoiseInterval]) -> None:
    """Raises ValueError for the first gap or overlap between intervals in order of their lower edges."""
    if not intervals:
        raise ValueError("an ensemble needs at least one expert; received none")
    noise = intervals[0].distribution
    if other := next((interval for interval in intervals if interval.distribution != noise), None):
        raise ValueError(f"the experts' intervals are of different noise: {noise} and {other.distribution}")
    if gaps := complement(intervals, NoiseInterval(Fraction(0), Fraction(1), noise)):
        raise ValueError(f"no expert answers for {'; '.join(map(str, gaps))}")
    for lower, upper in pairwise(intervals):
        if upper.u_lo < lower.u_hi:
            both = NoiseInterval(upper.u_lo, min(lower.u_hi, upper.u_hi), noise)
            raise ValueError(f"two experts answer for {both}")
