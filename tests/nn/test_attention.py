"""Attention against its formula written out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from t2i_experts.nn.attention import CrossAttention, SelfAttention
from t2i_experts.nn.layers import rms_norm


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def explicit(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head, one after the other: q (B, Lq, C), k and v (B, Lk, C)."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        out.append(scores.softmax(-1) @ vh)
    return torch.cat(out, -1)


def head_norm(x: Tensor, gain: Tensor) -> Tensor:
    return torch.cat([rms_norm(part, -1) * gain for part in x.split(len(gain), -1)], -1)


def test_self_attention() -> None:
    module = SelfAttention(16, 8)
    randomise(module)
    x = torch.randn(2, 16, 3, 5)
    pixels = x.permute(0, 2, 3, 1).reshape(2, 15, 16)
    q, k, v = (rms_norm(pixels, -1) * module.norm_gain @ module.qkv.weight.T).chunk(3, -1)
    h = explicit(head_norm(q, module.query_norm.gain), head_norm(k, module.key_norm.gain), v, heads=2)
    expected = x + module.out(h).reshape(2, 3, 5, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


def test_cross_attention_with_mask() -> None:
    module = CrossAttention(16, 6, 8)
    randomise(module)
    x, context = torch.randn(2, 16, 2, 2), torch.randn(2, 5, 6)
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    pixels = x.permute(0, 2, 3, 1).reshape(2, 4, 16)
    k, v = (context @ module.key_value.weight.T).chunk(2, -1)
    q = rms_norm(pixels, -1) * module.norm_gain @ module.query.weight.T
    h = explicit(head_norm(q, module.query_norm.gain), head_norm(k, module.key_norm.gain), v, heads=2, mask=mask)
    expected = x + module.out(h).reshape(2, 2, 2, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(module(x, module.project(context), mask), expected, atol=1e-5, rtol=1e-4)
