"""The update of the weights: AdamW and their moving average."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from t2i_experts.bench.error import relative_rms
from t2i_experts.bench.floor import bandwidth
from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.config import OptimizerConfig
from t2i_experts.training.ema import EMA
from t2i_experts.training.optim import build_optimizer

CALLS = 8  # steps in a row that are timed together, as in a loop, which waits for none of them
_WIDTH = 256
_BYTES = 28 + 12  # a parameter: AdamW reads weight, gradient and two moments and writes three; EMA reads two and writes one


def bench_optimizer(millions: int, device: torch.device, *, repeats: int = 10) -> Result:
    """One step over convolutions of 0.6 M parameters each, in float32.

    The baseline: `torch.optim.AdamW` with its defaults, and an average that is moved parameter by parameter, in three operations each (as
    diffusers' `EMAModel` with its defaults). error: of the average after one step from equal weights, against float64.
    """
    if millions < 1:
        raise ValueError(f"--parameters={millions} must be at least 1 (million)")
    layers = max(1, round(millions * 1e6 / (9 * _WIDTH**2)))
    with torch.device(device):
        network, twin = (nn.Sequential(*(nn.Conv2d(_WIDTH, _WIDTH, 3) for _ in range(layers))) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    for parameter, same in zip(network.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        same.grad = parameter.grad.clone()
    start = [parameter.detach().clone() for parameter in network.parameters()]

    config = OptimizerConfig(learning_rate=1e-4)
    fused, ema = build_optimizer(network, config), EMA(network, halflife_kimg=500)
    defaults = torch.optim.AdamW(
        twin.parameters(), lr=1e-4, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay
    )
    averages = [parameter.clone() for parameter in start]
    share = 1 - ema.beta(256, 10**6)

    def own() -> None:
        fused.step()
        ema.update(network, 256, 10**6)

    @torch.no_grad()
    def baseline() -> None:
        defaults.step()
        for average, parameter in zip(averages, twin.parameters(), strict=True):
            average.sub_(share * (average - parameter))

    baseline()
    own()
    errors = {"defaults, loop": _error(start, twin, averages, share)}
    errors["fused, foreach"] = _error(start, network, list(ema.network.parameters()), share)
    timings = interleave({"defaults, loop": baseline, "fused, foreach": own}, device, repeats=repeats, calls=CALLS)
    count = sum(parameter.numel() for parameter in start)
    least = _BYTES * count / bandwidth(device)
    slow, fast = timings.values()
    rows = [Row(name, timing, floor=timing.median / least, error=errors[name]) for name, timing in timings.items()]
    rows[1] = replace(rows[1], ratio=slow.median / fast.median)
    return Result("optimizer", describe(device), {"parameters": count, "tensors": len(start), "repeats": repeats}, rows)


def _error(start: list[Tensor], network: nn.Module, averages: list[Tensor], share: float) -> float:
    """Of an average after one step, relative to how far it should have moved."""
    steps = [share * (new.detach().double() - old.double()) for new, old in zip(network.parameters(), start, strict=True)]
    return relative_rms([average.double() - old.double() for average, old in zip(averages, start, strict=True)], steps)
