"""What every optimiser step does, in training and where one is only measured: gradients of one or several batches, then the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from t2i_experts.training.task import Batch, DiffusionTask
from t2i_experts.training.uncertainty import LearnedWeighting
from t2i_experts.types import Denoiser


def avoid_cudnn_attention() -> None:
    """Keeps PyTorch from taking cuDNN's attention by itself, in this process and from now on: call it before anything is compiled.

    With a mask, its gradients are NaN at some shapes (seen with torch 2.11 on an H200; pytorch/pytorch issue 196678). `nn.attention`,
    which has no masks, asks for it nevertheless.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def add_gradients(
    task: DiffusionTask, denoiser: Denoiser, batch: Batch, accumulation: int = 1, weighting: LearnedWeighting | None = None
) -> Tensor:
    """Adds the gradients of a batch, one of `accumulation` that make a step. Returns each image's loss, (B,) float32, as it is without
    `weighting`."""
    losses, sigma = task.losses(denoiser, batch)
    objective = weighting.objective(losses, sigma) if weighting else losses
    (objective.mean() / accumulation).backward()
    return losses.detach()


def apply_gradients(network: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Takes the step, with gradients cut to a norm of `clip_norm` (0: as they are), and forgets them. Returns their norm before, 0-d."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
