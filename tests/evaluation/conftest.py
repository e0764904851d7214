"""Random weights of the network of FID, of which no public ones are committed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_experts.evaluation.inception import InceptionFID


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pth as the public one is, whose features neither vanish nor explode."""
    torch.manual_seed(0)
    network = InceptionFID()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path
