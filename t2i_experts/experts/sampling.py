"""What each expert of an ensemble is sampled with: a guidance of its own, and noise levels of its own in its part of the schedule.

Leaves are given by name, with intervals that partition all noise: those of an ensemble or of a plan. A single network has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from t2i_experts.config import SamplingConfig
from t2i_experts.diffusion.guidance import ScaleBySigma
from t2i_experts.diffusion.samplers import karras_sigmas
from t2i_experts.experts.interval import NoiseInterval


def schedule(sampling: SamplingConfig, leaves: Mapping[str, NoiseInterval]) -> Tensor:
    """The noise levels of a sampling: descending from sigma_max, and a final 0; (n + 1,) float64 on the CPU.

    A leaf with n steps of its own has n levels, evenly spaced in sigma^(1/rho) from the upper edge of its part of [sigma_min, sigma_max] to
    the lower one, which is not among them: it is the upper edge of the leaf below. The lowest ends at sigma_min. All other leaves
    have the levels that lie there in `karras_sigmas` of `sampling.steps`, which without steps of leaves is the whole schedule.

    Raises ValueError for leaves that there are not, steps of a leaf without noise levels to sample, and what `karras_sigmas` refuses.
    """
    check_leaves(sampling, leaves)
    common = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    counts = {name: one.steps for name, one in sampling.experts.items() if one.steps is not None}
    if not counts:
        return common
    parts = []
    for name, interval in sorted(leaves.items(), key=lambda leaf: leaf[1].u_lo, reverse=True):
        parts.append(_levels(name, interval, counts[name], sampling) if name in counts else common[interval.contains(common)])
    return torch.cat([*parts, common.new_zeros(1)])


def guidance_scale(sampling: SamplingConfig, leaves: Mapping[str, NoiseInterval]) -> float | ScaleBySigma:
    """The scale for `ClassifierFreeGuidance`: one for all, or one for each leaf. Raises ValueError for leaves that there are not."""
    check_leaves(sampling, leaves)
    own = {name: one.guidance for name, one in sampling.experts.items() if one.guidance is not None}
    if not own:
        return sampling.guidance
    ordered = sorted(leaves.items(), key=lambda leaf: leaf[1].u_lo)
    return ScaleBySigma(
        tuple(interval.sigma_hi for _, interval in ordered[:-1]), tuple(own.get(name, sampling.guidance) for name, _ in ordered)
    )


def check_leaves(sampling: SamplingConfig, leaves: Mapping[str, NoiseInterval], prefix: str = "sampling.experts.") -> None:
    """Raises ValueError, which begins with `prefix` and the name, for settings of an expert that there is not."""
    for name in sampling.experts:
        if name not in leaves:
            there = f"its experts: {', '.join(leaves)}" if leaves else "it is a single network"
            raise ValueError(f"{prefix}{name}: this model has no such expert; {there}")


def _levels(name: str, interval: NoiseInterval, count: int, sampling: SamplingConfig) -> Tensor:
    """The levels, descending, of a leaf that is to have so many."""
    hi, lo = min(interval.sigma_hi, sampling.sigma_max), max(interval.sigma_lo, sampling.sigma_min)
    if not lo < hi:
        raise ValueError(
            f"sampling.experts.{name}.steps={count} would be ignored: sigma_min={sampling.sigma_min} to sigma_max={sampling.sigma_max} "
            f"leaves nothing to sample in {interval}"
        )
    if interval.sigma_lo < sampling.sigma_min:
        return karras_sigmas(count, lo, hi, sampling.rho)[:-1]
    return karras_sigmas(count + 1, lo, hi, sampling.rho)[:-2]
