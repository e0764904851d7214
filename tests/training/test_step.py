"""The parts of an optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_experts.config import load_config
from t2i_experts.training.measure import measure_training
from t2i_experts.training.step import apply_gradients
from t2i_experts.training.trainer import Trainer


@pytest.mark.parametrize(("clip_norm", "scale"), [(0.0, 1.0), (10.0, 1.0), (2.5, 0.5)])
def test_gradients_are_cut_applied_and_forgotten(clip_norm: float, scale: float) -> None:
    network = nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    network.weight.grad = torch.tensor([[3.0, -4.0]])
    norm = apply_gradients(network, torch.optim.SGD(network.parameters(), lr=1.0), clip_norm)
    assert float(norm) == 5
    torch.testing.assert_close(network.weight.detach(), before - scale * torch.tensor([[3.0, -4.0]]))
    assert network.weight.grad is None


@pytest.fixture
def cudnn_attention() -> Iterator[None]:
    """On, as PyTorch comes."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("begin", [measure_training, lambda config: Trainer(config, progress=False)])
def test_all_that_trains_avoids_cudnns_attention(
    write_config: Callable[[str], Path], cudnn_attention: None, begin: Callable[..., object]
) -> None:
    begin(load_config(write_config("run"), ["training.images=8"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
