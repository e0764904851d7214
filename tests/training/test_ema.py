"""The moving average against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i_experts.training.ema import EMA


def test_half_life() -> None:
    """After a half-life of images at a constant network, half of the distance is gone, however it is cut into steps."""
    for batch in (1000, 250):
        network = nn.Linear(3, 2)
        ema = EMA(network, halflife_kimg=10, rampup=0)
        start = [p.clone() for p in ema.network.parameters()]
        target = nn.Linear(3, 2)
        for step in range(10_000 // batch):
            ema.update(target, batch, (step + 1) * batch)
        for mean, old, new in zip(ema.network.parameters(), start, target.parameters(), strict=True):
            torch.testing.assert_close(mean, (old + new) / 2)


def test_ramp_up_shortens_the_memory_of_a_young_run() -> None:
    ema = EMA(nn.Linear(1, 1), halflife_kimg=500, rampup=0.05)
    assert ema.beta(100, 1000) == pytest.approx(0.5 ** (100 / 50))
    assert ema.beta(100, 10**9) == pytest.approx(0.5 ** (100 / 500_000))
    assert ema.beta(100, 0) == pytest.approx(0.0)


def test_average_is_a_frozen_copy() -> None:
    network = nn.Linear(2, 2)
    ema = EMA(network, 1)
    before = ema.network.weight.clone()
    nn.init.zeros_(network.weight)
    assert torch.equal(ema.network.weight, before)
    assert not any(p.requires_grad for p in ema.network.parameters())
