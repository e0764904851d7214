"""Checkpoints: a round trip gives everything back, and half a checkpoint is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_experts.config import OptimizerConfig
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.ema import EMA
from t2i_experts.training.optim import build_optimizer
from t2i_experts.training.state import TrainState


def state(seed: int, dataset_hash: str = "abc", width: int = 4) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 1))
    return TrainState(
        network, EMA(network, 1.0), build_optimizer(network, OptimizerConfig(learning_rate=0.1)), 0, dataset_hash, {"t5": "12"}, {"a": 1}
    )


def advance(s: TrainState, steps: int) -> None:
    for _ in range(steps):
        x = torch.linspace(-1, 1, 6).view(2, 3) * (s.images_seen + 1)
        s.optimizer.zero_grad()
        s.network(x).square().mean().backward()
        s.optimizer.step()
        s.images_seen += 2
        s.ema.update(s.network, 2, s.images_seen)


def weights(s: TrainState) -> list[torch.Tensor]:
    return [*s.network.parameters(), *s.ema.network.parameters()]


def test_going_on_equals_never_stopping(tmp_path: Path) -> None:
    unbroken, broken, resumed = state(0), state(0), state(1)
    advance(unbroken, 5)
    advance(broken, 3)
    resumed.restore(broken.save(tmp_path, keep=2)[0])
    assert resumed.images_seen == 6
    advance(resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(resumed), strict=True))


def test_newest_are_kept_and_unfinished_ones_ignored(tmp_path: Path) -> None:
    s = state(0)
    for _ in range(4):
        advance(s, 1)
        s.save(tmp_path, keep=2)
    (tmp_path / "checkpoints" / ".000000000010.tmp").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["000000000006", "000000000008"]


def test_other_shards_are_refused(tmp_path: Path) -> None:
    folder, _ = state(0).save(tmp_path, keep=1)
    with pytest.raises(ValueError, match="other shards"):
        state(0, dataset_hash="xyz").restore(folder)


def test_other_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        state(0, width=5).restore(state(0).save(tmp_path, keep=1)[0])
