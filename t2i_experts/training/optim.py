"""AdamW and its learning rate as a function of the images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from t2i_experts.config import OptimizerConfig


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, in torch's fused implementation."""
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimizerConfig, images_seen: int, total_images: int) -> float:
    """The rate for a step that begins after `images_seen` of `total_images` images.

    A linear warm-up over `warmup_images`, then constant, or down to zero at `total_images` along a line or half a cosine.
    """
    if images_seen < config.warmup_images:
        return config.learning_rate * (images_seen + 1) / config.warmup_images
    progress = min((images_seen - config.warmup_images) / max(total_images - config.warmup_images, 1), 1.0)
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - progress)
        case "cosine":
            return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
