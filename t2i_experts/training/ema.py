"""Exponential moving average of the weights, with EDM's half-life in images and its ramp-up (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from t2i_experts.config import EMAConfig
from t2i_experts.training.power_ema import PowerFunctionEMA, move_towards


class EMA:
    """A float32 copy of a network that follows it: beta = 0.5^(batch / half-life), half-life = min(halflife_kimg, rampup * images seen)."""

    def __init__(self, network: nn.Module, halflife_kimg: float, rampup: float = 0.05) -> None:
        self.network: nn.Module = copy.deepcopy(network).eval().requires_grad_(False)
        self.halflife_kimg = halflife_kimg
        self.rampup = rampup

    def beta(self, batch: int, images_seen: int) -> float:
        """Weight of the old average for a step over `batch` images after which `images_seen` images have been seen."""
        halflife = min(self.halflife_kimg * 1000, self.rampup * images_seen) if self.rampup else self.halflife_kimg * 1000
        return 0.5 ** (batch / max(halflife, 1e-8))

    def update(self, network: nn.Module, batch: int, images_seen: int) -> None:
        """Moves the average towards the weights of `network`, which has the architecture that it was made from."""
        move_towards(self.network, network, 1 - self.beta(batch, images_seen))

    def state_dict(self) -> dict[str, Tensor]:
        """The average, under the network's own names."""
        return self.network.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises RuntimeError for tensors of other names or shapes."""
        self.network.load_state_dict(state)


WeightAverage = EMA | PowerFunctionEMA


def build_ema(network: nn.Module, config: EMAConfig) -> WeightAverage:
    """The average that `config` asks for, of a network that has not been trained yet."""
    match config.kind:
        case "halflife":
            return EMA(network, config.halflife_kimg, config.rampup)
        case "power":
            return PowerFunctionEMA(network, config.sigma_rel)
