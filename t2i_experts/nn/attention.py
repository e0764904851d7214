"""Attention over pixels and over the text, in eDiff-I's order: self-attention, then cross-attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from t2i_experts.nn.layers import rms_norm, zeroed

_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the first that can
_FAR_BELOW = -30_000.0  # finite in float16 too; exp(-30000 / sqrt(d)) is 0 for every d that a head can have


def fastest_kernels(device: torch.device) -> AbstractContextManager[None]:
    """What attention in here is computed by: cuDNN's kernels where they can, which are the fastest on Hopper GPUs.

    For attention without masks alone: with one, the gradients of cuDNN's are NaN at some shapes (pytorch/pytorch issue 196678, seen with
    torch 2.11 on an H200). To be entered outside of what is compiled, whose graph could not be cached with it.
    """
    if device.type != "cuda":
        return nullcontext()
    kernels: AbstractContextManager[None] = sdpa_kernel(_KERNELS, set_priority=True)
    return kernels


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each (B, L, heads, d), k and v of another L; returns (B, L, heads * d)."""
    h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return h.transpose(1, 2).flatten(2)


def _values(projected: Tensor) -> Tensor:
    """Which parts of (B, L, parts, heads, d) are values, the last, and hence not normed: bool, to be broadcast.

    Chosen by a mask and not by cutting the tensor up: so a norm, forward and backward, is one pass over all parts.
    """
    parts = projected.shape[2]
    return torch.arange(parts, device=projected.device)[:, None, None] == parts - 1


class SelfAttention(nn.Module):
    """Residual attention of every pixel to every pixel: (B, H, W, C) -> (B, H, W, C).

    Queries and keys are normed in each head, which keeps the scores bounded in bfloat16.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = zeroed(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = rms_norm(x.flatten(1, 2))
        qkv = self.qkv(h).unflatten(2, (3, -1, self.head_channels))  # (B, H*W, 3, heads, d)
        q, k, v = torch.where(_values(qkv), qkv, rms_norm(qkv)).unbind(2)
        return x + self.out(_attend(q, k, v)).view_as(x)


class CrossAttention(nn.Module):
    """Residual attention of every pixel to the tokens of the context. Keys and values do not depend on sigma: see `project`.

    The last channel of each head belongs to padding, in place of a mask, with which there is no fast kernel: it is 1 in all queries, 0 in
    the keys of real tokens, and in those of padding so far below zero that their weight is exactly 0. (A head's own d - 1 channels come
    from layers of width d: a product of matrices is slow where the sides are no multiples of 8.)
    """

    def __init__(self, channels: int, context_channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(context_channels, 2 * channels, bias=False)
        self.key_gain = nn.Parameter(torch.ones(head_channels - 1))
        self.out = zeroed(nn.Linear(channels, channels, bias=False))

    def project(self, context: Tensor, context_mask: Tensor) -> Tensor:
        """context: (B, L, D); context_mask: (B, L) bool, True = real token, at least one in each row. Returns keys and values,
        (B, L, 2, heads, d)."""
        projected = self.key_value(context).unflatten(2, (2, -1, self.head_channels))
        padding = torch.where(context_mask, 0.0, _FAR_BELOW).to(projected.dtype)[:, :, None, None, None]
        keys = self._own_channels(projected, padding, gain=F.pad(self.key_gain, (0, 1)).to(projected.dtype))
        return torch.where(_values(projected), projected, keys)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        """x: (B, H, W, C); key_value: from `project`."""
        h = rms_norm(x.flatten(1, 2))
        q = self.query(h).unflatten(2, (-1, self.head_channels))  # (B, H*W, heads, d)
        keys, values = key_value.to(q.dtype).unbind(2)
        return x + self.out(_attend(self._own_channels(q, 1.0), keys, values)).view_as(x)

    def _own_channels(self, x: Tensor, last: Tensor | float, gain: Tensor | float = 1.0) -> Tensor:
        """x (..., d) with a head's own channels normed, times `gain`, and the last one, which is padding's, replaced."""
        is_last = torch.arange(self.head_channels, device=x.device) == self.head_channels - 1
        own = torch.where(is_last, 0.0, x)
        return torch.where(is_last, last, rms_norm(own, channels=self.head_channels - 1) * gain)
