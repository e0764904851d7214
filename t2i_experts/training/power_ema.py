"""EDM2's power-function EMA: profiles that grow with the run, tracked in training (Karras et al. 2024, section 3 and appendix C).

The average after t images weighs the network as it was after tau images by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its width is
told as sigma_rel, the standard deviation of p in units of t. Averages of a few widths, stored at a few times, span the averages of other
widths closely enough to make them when training is over: see `posthoc_coefficients`, and `training.posthoc` for the files.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

WIDEST = 12**-0.5
"""sigma_rel of the uniform average, gamma = 0; narrower ones, down to 0, forget the early run."""


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The gamma for which sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)): the largest root of a cubic (algorithm 2).

    Raises ValueError unless 0 < sigma_rel < 12^-0.5.
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"sigma_rel={sigma_rel} must be positive and below {WIDEST:.4f}, where the average is uniform")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_beta(gamma: float, batch: int, images_seen: int) -> float:
    """Weight of the old average for a step over `batch` images after which `images_seen` have been seen (eq. 127).

    beta = (1 - batch / images_seen)^(gamma + 1). The products telescope: each step's network weighs the integral of p over its images.
    """
    return (1 - batch / images_seen) ** (gamma + 1)


@torch.no_grad()
def move_towards(average: nn.Module, network: nn.Module, share: float) -> None:
    """Moves the average's parameters by `share` of the way to those of a network of its architecture; buffers are copied."""
    torch._foreach_lerp_([p.detach() for p in average.parameters()], [p.detach() for p in network.parameters()], share)
    for old, buffer in zip(average.buffers(), network.buffers(), strict=True):
        old.copy_(buffer)


class PowerFunctionEMA:
    """Float32 copies of a network that follow it, one for each width in `sigma_rels`; the weights before the first step count nothing."""

    def __init__(self, network: nn.Module, sigma_rels: Sequence[float]) -> None:
        """Raises ValueError for a width that is out of range."""
        self.sigma_rels = tuple(sigma_rels)
        self._gammas = [sigma_rel_to_gamma(sigma_rel) for sigma_rel in sigma_rels]
        self.networks = nn.ModuleList(copy.deepcopy(network).eval().requires_grad_(False) for _ in sigma_rels)

    @property
    def network(self) -> nn.Module:
        """The average of the first width: the one that is validated, previewed and saved as the model."""
        return self.networks[0]

    def update(self, network: nn.Module, batch: int, images_seen: int) -> None:
        """Moves the averages towards the weights of `network`, which has the architecture that they were made from."""
        for gamma, average in zip(self._gammas, self.networks, strict=True):
            move_towards(average, network, 1 - power_beta(gamma, batch, images_seen))

    def state_dict(self) -> dict[str, Tensor]:
        """All averages, as WIDTH.NAME with the width's place in `sigma_rels`."""
        return self.networks.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises RuntimeError for tensors of other names or shapes."""
        self.networks.load_state_dict(state)


@dataclass(frozen=True)
class Profile:
    """The weighting of an average of width `sigma_rel` after `images_seen` images."""

    images_seen: int
    sigma_rel: float


def inner_products(rows: Sequence[Profile], columns: Sequence[Profile]) -> np.ndarray:
    """Integrals over tau of p_i p_j (algorithm 3), float64 of shape (rows, columns), in units of 1 / images.

    (gamma_i + 1)(gamma_j + 1) / (gamma_i + gamma_j + 1) / t_max * (t_min / t_max)^(gamma of the later one).
    """
    t_i, t_j = (np.array([float(p.images_seen) for p in profiles]) for profiles in (rows, columns))
    gamma_i, gamma_j = (np.array([sigma_rel_to_gamma(p.sigma_rel) for p in profiles]) for profiles in (rows, columns))
    t_i, gamma_i = t_i[:, None], gamma_i[:, None]
    later = np.where(t_i > t_j, gamma_i, gamma_j)
    t_max, t_min = np.maximum(t_i, t_j), np.minimum(t_i, t_j)
    return (gamma_i + 1) * (gamma_j + 1) / (gamma_i + gamma_j + 1) / t_max * (t_min / t_max) ** later


def posthoc_coefficients(tracked: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """What to multiply tracked averages by, so that their sum is nearest to the average with the target's profile.

    Least squares between the profiles, under the constraint that the coefficients sum to 1 as each profile does. A target that is
    among the tracked ones is exactly that one.

    Returns the coefficients, and the distance of the profiles relative to the norm of the target's: 0 for a perfect match.
    """
    if target in tracked:
        return np.array([float(profile == target) for profile in tracked]), 0.0
    gram, wanted = inner_products(tracked, tracked), inner_products(tracked, [target])[:, 0]
    norms = np.sqrt(np.diag(gram))
    unit = gram / norms[:, None] / norms
    system = np.block([[unit, 1 / norms[:, None]], [1 / norms[None], np.zeros((1, 1))]])
    coefficients = np.linalg.solve(system, np.append(wanted / norms, 1.0))[:-1] / norms
    square = inner_products([target], [target])[0, 0]
    distance = square - 2 * coefficients @ wanted + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(distance / square, 0.0)))
