"""Attention against its formula written out."""

from __future__ import annotations

import pytest
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


def head_norm(x: Tensor, head: int, own: int) -> Tensor:
    """The norm of the first `own` channels of each head, and zeros in its others."""
    return torch.cat([torch.nn.functional.pad(rms_norm(part[..., :own]), (0, head - own)) for part in x.split(head, -1)], -1)


def test_self_attention() -> None:
    module = SelfAttention(16, 8)
    randomise(module)
    x = torch.randn(2, 3, 5, 16)
    pixels = x.reshape(2, 15, 16)
    q, k, v = (rms_norm(pixels) @ module.qkv.weight.T).chunk(3, -1)
    h = explicit(head_norm(q, 8, 8), head_norm(k, 8, 8), v, heads=2)
    expected = x + module.out(h).reshape(x.shape)
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)


MASK = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])


def test_cross_attention_with_mask() -> None:
    module = CrossAttention(16, 6, 8)
    randomise(module)
    x, context = torch.randn(2, 2, 2, 16), torch.randn(2, 5, 6)
    pixels = x.reshape(2, 4, 16)
    k, v = (context @ module.key_value.weight.T).chunk(2, -1)
    q = rms_norm(pixels) @ module.query.weight.T
    gain = torch.cat([module.key_gain, torch.zeros(1)]).repeat(2)
    h = explicit(head_norm(q, 8, 7), head_norm(k, 8, 7) * gain, v, heads=2, mask=MASK)
    expected = x + module.out(h).reshape(x.shape)
    torch.testing.assert_close(module(x, module.project(context, MASK)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [8, 32, 128])
def test_padding_has_no_influence_at_all(dtype: torch.dtype, head: int) -> None:
    module = CrossAttention(128, 6, head).to(dtype)
    randomise(module)
    x, context = torch.randn(2, 2, 2, 128, dtype=dtype), torch.randn(2, 5, 6, dtype=dtype)
    other = torch.where(MASK[..., None], context, 1000 * torch.randn(2, 5, 6)).to(dtype)
    assert torch.equal(module(x, module.project(context, MASK)), module(x, module.project(other, MASK)))
    assert not torch.equal(module(x, module.project(context, MASK)), module(x, module.project(context.flip(1), MASK)))

    context.requires_grad_()
    module(x, module.project(context, MASK)).float().square().sum().backward()
    assert context.grad is not None and context.grad.isfinite().all()
    assert not context.grad[~MASK].any() and context.grad[MASK].any()
