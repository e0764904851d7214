"""One step of a training loop, this project's and that of diffusers' example: what is timed, and nothing around it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_experts.bench.baseline import LAYOUTS, diffusers_context, diffusers_ema, diffusers_library, diffusers_network
from t2i_experts.bench.network import Size, captions, noise_images, own_network
from t2i_experts.config import EMAConfig, OptimizerConfig
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.training.ema import build_ema
from t2i_experts.training.optim import build_optimizer
from t2i_experts.training.step import apply_gradients
from t2i_experts.types import Conditioning

ALL = slice(None)


class Loop(Protocol):
    """What is timed. network: its weights, float32. model: what a step calls, the network or its compiled form."""

    network: nn.Module
    model: Any
    device: torch.device
    batch: int

    def losses(self, model: Any, rows: slice) -> Tensor:
        """The loss of each of these images of the batch, (N,) float32."""
        ...

    def update(self) -> None:
        """What follows the backward pass."""
        ...


class OwnLoop:
    """This project's step, as `training.trainer` takes it. backend: torch.compile's, None: not compiled. text: default: `captions`."""

    def __init__(self, size: Size, batch: int, device: torch.device, backend: str | None, text: Conditioning | None = None) -> None:
        self.device, self.batch = device, batch
        self.network: nn.Module = own_network(size, device)
        self.model: Any = self.network
        if backend:
            compile_denoiser(self.network, training=True, dynamic=None, backend=backend)
        self._config = OptimizerConfig()
        self._optimizer, self._ema = build_optimizer(self.network, self._config), build_ema(self.network, EMAConfig())
        self._loss, self._conditioning = EDMLoss(), text or captions(batch, device)
        self._images, self._eps = (noise_images(size, batch, device, seed) for seed in (0, 1))
        self._sigma = torch.randn(batch, generator=torch.Generator().manual_seed(2)).mul(1.2).sub(1.2).exp().to(device)
        self._images_seen = 10**6

    def losses(self, model: Any, rows: slice) -> Tensor:
        """See `Loop`."""
        conditioning = self._conditioning.map(lambda tensor: tensor[rows])
        return self._loss(model, self._images[rows], self._sigma[rows], self._eps[rows], conditioning)

    def update(self) -> None:
        """See `Loop`."""
        apply_gradients(self.network, self._optimizer, self._config.clip_norm)
        self._images_seen += self.batch
        self._ema.update(self.network, self.batch, self._images_seen)


class DiffusersLoop:
    """The step of diffusers' example `train_text_to_image.py` with its defaults, without its encoders, and without its two waits a step
    for the loss."""

    def __init__(self, size: Size, batch: int, device: torch.device, layout: str, *, compiled: bool) -> None:
        self.device, self.batch = device, batch
        self.network = diffusers_network(size, device, layout)
        # Static, or a second layout in one process would be compiled for strides that vary.
        self.model: Any = torch.compile(self.network, dynamic=False) if compiled else self.network
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self._ema, self._scheduler = diffusers_ema(self.network), diffusers_library().DDPMScheduler(num_train_timesteps=1000)
        images, noise = (noise_images(size, batch, device, seed) for seed in (0, 1))
        self._images, self._noise = (tensor.contiguous(memory_format=LAYOUTS[layout]) for tensor in (images, noise))
        self._timesteps = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2)).to(device)
        self._context = diffusers_context(size, batch, device)

    def losses(self, model: Any, rows: slice) -> Tensor:
        """See `Loop`."""
        noise, timesteps = self._noise[rows], self._timesteps[rows]
        noisy = self._scheduler.add_noise(self._images[rows], noise, timesteps)
        predicted = model(noisy, timesteps, self._context[rows], return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))

    def update(self) -> None:
        """See `Loop`."""
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.step(self.network.parameters())


def add_batch_gradients(loop: Loop, rows: slice = ALL) -> None:
    """The gradients of the mean loss of these images, of a pass over the whole batch in bfloat16 autocast."""
    with torch.autocast(loop.device.type, torch.bfloat16):
        losses = loop.losses(loop.model, ALL)
    losses[rows].mean().backward()
