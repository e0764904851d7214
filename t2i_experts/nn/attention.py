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
        q, k, v = self.qkv(h).unflatten(2, (3, -1, self.head_channels)).permute(2, 0, 3, 1, 4)  # each (B, heads, H*W, d)
        h = F.scaled_dot_product_attention(rms_norm(q), rms_norm(k), v)
        return x + self.out(h.transpose(1, 2).flatten(2)).view_as(x)


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
        (B, 2, heads, L, d)."""
        keys, values = self.key_value(context).unflatten(2, (2, -1, self.head_channels)).permute(2, 0, 3, 1, 4)
        own = rms_norm(keys[..., :-1]) * self.key_gain.to(keys.dtype)
        padding = torch.where(context_mask, 0.0, _FAR_BELOW).to(keys.dtype)[:, None, :, None].expand_as(keys[..., :1])
        return torch.stack([torch.cat([own, padding], -1), values], dim=1)

    def forward(self, x: Tensor, key_value: Tensor) -> Tensor:
        """x: (B, H, W, C); key_value: from `project`."""
        h = rms_norm(x.flatten(1, 2))
        q = self.query(h).unflatten(2, (-1, self.head_channels)).transpose(1, 2)  # (B, heads, H*W, d)
        q = F.pad(rms_norm(q[..., :-1]), (0, 1), value=1.0)
        keys, values = key_value.to(q.dtype).unbind(1)
        h = F.scaled_dot_product_attention(q, keys, values)
        return x + self.out(h.transpose(1, 2).flatten(2)).view_as(x)
