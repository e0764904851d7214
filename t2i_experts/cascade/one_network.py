"""Low-rank experts that share one network: its weights are written anew, in place, when another expert is to evaluate.

On the device there is one network and the experts' differences; the root's weights, from which each expert is made, stay with the host, in
page-locked memory if the device is CUDA. A picture changes the expert once for each that it passes. What is computed is what loading the
experts one by one computes, so that pictures are the same bit for bit; compiled code and CUDA graphs read weights where they lie, and serve
all experts.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from t2i_experts.cascade.expert_weights import RootWeights, empty_network, for_sampling, put_on
from t2i_experts.config import StageConfig
from t2i_experts.diffusion.guidance import prepare
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.lowrank import LowRankDifference
from t2i_experts.types import Conditioning, Denoiser


class SharedNetwork:
    """A network that is one expert after the other."""

    def __init__(self, config: StageConfig, root: RootWeights, device: torch.device | str, dtype: torch.dtype) -> None:
        """It is the root at first. Raises ValueError if the root's weights are not of this config's network."""
        nothing = LowRankDifference(root.digest[:16], {}, {})
        network = empty_network(config, root, device)
        put_on(network, root.state, nothing, root.state)
        self.network: EDMPrecond = for_sampling(network, dtype)
        self.turn = threading.RLock()
        """Held from the writing of weights to the end of an evaluation."""
        self._root = {name: _at_home(tensor, torch.device(device)) for name, tensor in root.state.items()}
        self._worn = nothing

    def become(self, difference: LowRankDifference) -> None:
        """Writes the weights of the expert that differs so from the root, in the place of those that are there."""
        if difference is not self._worn:
            put_on(self.network, self._root, difference, sorted(difference.names | self._worn.names))
            self._worn = difference


class SharingExpert:
    """A `Denoiser`: the shared network with an expert's weights."""

    def __init__(self, shared: SharedNetwork, difference: LowRankDifference, evaluate: Denoiser | None = None) -> None:
        """difference: on the network's device. evaluate: what is called once the shared network has the expert's weights; None: the
        network itself."""
        self.shared = shared
        self._difference = difference
        self._evaluate = evaluate or shared.network

    def evaluating(self, evaluate: Denoiser) -> SharingExpert:
        """The same expert, by way of a denoiser around the shared network."""
        return SharingExpert(self.shared, self._difference, evaluate)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """What the expert makes of the conditioning."""
        with self.shared.turn:
            self.shared.become(self._difference)
            return prepare(self._evaluate, conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The expert's estimate."""
        with self.shared.turn:
            self.shared.become(self._difference)
            return self._evaluate(x, sigma, conditioning)


def _at_home(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the host: what is mapped from a file must not be read once the file may have been written over."""
    copy = tensor.clone()
    return copy.pin_memory() if device.type == "cuda" else copy
