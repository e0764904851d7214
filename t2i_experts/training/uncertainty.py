"""The learned weighting of noise levels as a part of a run: it has an optimiser of its own, and is thrown away with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from t2i_experts.config import OptimizerConfig
from t2i_experts.diffusion.uncertainty import UncertaintyWeighting
from t2i_experts.training.optim import build_optimizer


class LearnedWeighting:
    """u(sigma) and its optimiser: the network's, but without weight decay, which would pull u to 0."""

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.module = UncertaintyWeighting().to(device)
        self.optimizer = build_optimizer(self.module, replace(config, weight_decay=0.0))

    def objective(self, losses: Tensor, sigma: Tensor) -> Tensor:
        """What to minimise instead of the losses; see `UncertaintyWeighting`."""
        return self.module.objective(losses, sigma)

    def step(self, learning_rate: float, mean: Callable[[Tensor], Tensor]) -> None:
        """One step. mean: of a tensor over all processes, whose gradients are not shared otherwise."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            for parameter in group["params"]:
                parameter.grad = mean(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
