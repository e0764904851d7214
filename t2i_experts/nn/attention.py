"""Attention over pixels and over the text, in eDiff-I's order: self-attention, then cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_experts.nn.layers import rms_norm, zeroed


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view in channels-last memory."""
    return x.flatten(2).transpose(1, 2)


def _image(pixels: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) of the sides of `like`."""
    return pixels.transpose(1, 2).unflatten(2, like.shape[2:])


class _HeadNorm(nn.Module):
    """Root-mean-square norm of each head's queries or keys, which keeps the scores bounded in bfloat16."""

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(head_channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, -1) * self.gain.to(x.dtype)


class SelfAttention(nn.Module):
    """Residual attention of every pixel to every pixel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm_gain = nn.Parameter(torch.ones(channels))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.query_norm, self.key_norm = _HeadNorm(head_channels), _HeadNorm(head_channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = rms_norm(_pixels(x), -1) * self.norm_gain.to(x.dtype)
        q, k, v = self.qkv(h).unflatten(2, (3, -1, self.head_channels)).permute(2, 0, 3, 1, 4)  # each (B, heads, H*W, d)
        h = F.scaled_dot_product_attention(self.query_norm(q), self.key_norm(k), v)
        return x + _image(self.out(h.transpose(1, 2).flatten(2)), x)


class CrossAttention(nn.Module):
    """Residual attention of every pixel to the tokens of the context. Keys and values do not depend on sigma: see `project`."""

    def __init__(self, channels: int, context_channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm_gain = nn.Parameter(torch.ones(channels))
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(context_channels, 2 * channels, bias=False)
        self.query_norm, self.key_norm = _HeadNorm(head_channels), _HeadNorm(head_channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def project(self, context: Tensor) -> Tensor:
        """context: (B, L, D). Returns keys and values, (B, 2, heads, L, d)."""
        keys, values = self.key_value(context).unflatten(2, (2, -1, self.head_channels)).permute(2, 0, 3, 1, 4)
        return torch.stack([self.key_norm(keys), values], dim=1)

    def forward(self, x: Tensor, key_value: Tensor, context_mask: Tensor) -> Tensor:
        """x: (B, C, H, W); key_value: from `project`; context_mask: (B, L) bool, True = real token, at least one in each row."""
        h = rms_norm(_pixels(x), -1) * self.norm_gain.to(x.dtype)
        q = self.query_norm(self.query(h).unflatten(2, (-1, self.head_channels)).transpose(1, 2))  # (B, heads, H*W, d)
        keys, values = key_value.to(q.dtype).unbind(1)
        h = F.scaled_dot_product_attention(q, keys, values, attn_mask=context_mask[:, None, None, :])
        return x + _image(self.out(h.transpose(1, 2).flatten(2)), x)
