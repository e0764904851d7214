"""EDM preconditioning (Karras et al. 2022, section 5 and table 1; eDiff-I section 3.2): a network becomes a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from t2i_experts.types import Conditioning, Embedding


class Network(Protocol):
    """F(x; c_noise, projected), see `t2i_experts.nn.unet.UNet`.

    One that wants its kernels chosen in some way has `kernels(device)` too, a context manager in which it is called, and which is entered
    outside of what is compiled.
    """

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        """What depends on the prompt and not on sigma; not empty, and every tensor has the batch as its first dimension."""
        ...

    def __call__(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        """x: (B, C_in, H, W) of unit variance; c_noise: (B,) float32, ln(sigma)/4. Returns (B, C_out, H, W)."""
        ...


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma)/4): a `Denoiser` around a network.

        c_skip = sd^2 / (sigma^2 + sd^2)    c_out = sigma sd / sqrt(sigma^2 + sd^2)    c_in = 1 / sqrt(sigma^2 + sd^2)

    with sd = sigma_data, so that the network's input and training target have unit variance at every noise level.
    """

    network: Network

    def __init__(self, network: Network, sigma_data: float = 0.5) -> None:
        """network: an `nn.Module`."""
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def __call__(self, x: Tensor, *inputs: Any, **more: Any) -> Any:
        """`forward`, or what it is compiled to."""
        kernels: Any = getattr(self.network, "kernels", None)
        choice: AbstractContextManager[None] = kernels(x.device) if kernels else nullcontext()
        with choice:
            return super().__call__(x, *inputs, **more)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning with the network's projections of it, which depend on no sigma: for many calls with one prompt."""
        if conditioning.projected:
            return conditioning
        return replace(conditioning, projected=self.network.project(conditioning.embeddings))

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x: (B, C, H, W); sigma: 0-d or (B,), positive; conditioning: of B rows, prepared or not. Returns (B, C, H, W) float32.

        A 0-d sigma may stay on the CPU: the coefficients are then taken there, and nothing waits for the device.
        """
        sd, s = self.sigma_data, sigma if sigma.ndim == 0 else sigma.float()[:, None, None, None]
        variance = s.square() + sd**2
        c_skip, c_out, c_in = sd**2 / variance, s * sd / variance.sqrt(), 1 / variance.sqrt()
        c_noise = s.log().flatten() / 4
        if c_noise.device == x.device:
            c_noise = c_noise.expand(x.shape[0])
        else:
            c_noise = torch.full((x.shape[0],), float(c_noise), device=x.device)
        projected = conditioning.projected or self.network.project(conditioning.embeddings)
        output = self.network(c_in * x, c_noise, projected).float()
        return c_skip * x + c_out * output
