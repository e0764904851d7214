"""The norm over channels and the residual block."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from t2i_experts.nn.layers import ResidualBlock, concatenate, resample, rms_norm


def test_rms_norm_agrees_with_torch() -> None:
    x = torch.randn(2, 8, 5, 3)
    reference = F.rms_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(rms_norm(x, 1), reference)


def test_rms_norm_sees_channels_only() -> None:
    """Changing one pixel changes no other: what GroupNorm would break."""
    x = torch.randn(1, 8, 4, 4)
    y = x.clone()
    y[..., 0, 0] *= 100
    assert torch.equal(rms_norm(x, 1)[..., 1:, 1:], rms_norm(y, 1)[..., 1:, 1:])


def test_rms_norm_keeps_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 4, 2, 2), 1), torch.zeros(1, 4, 2, 2))


def test_resample_down_undoes_up() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert resample(x, "up").shape == (2, 3, 8, 12)
    torch.testing.assert_close(resample(resample(x, "up"), "down"), x)


@pytest.mark.parametrize(("mode", "side"), [("keep", 8), ("down", 4), ("up", 16)])
def test_fresh_residual_block_is_its_shortcut(mode: str, side: int) -> None:
    block = ResidualBlock(6, 6, 4, mode=mode)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 8, 8)
    out = block(x, torch.randn(2, 4))
    assert out.shape == (2, 6, side, side)
    torch.testing.assert_close(out, resample(x, mode))  # type: ignore[arg-type]


def test_embedding_scales_and_shifts() -> None:
    block = ResidualBlock(4, 8, 3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 4, 4, 4)
    first, second = block(x, torch.randn(1, 3)), block(x, torch.randn(1, 3))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_concatenations_gradients_are_dense_in_channels_last() -> None:
    """A convolution's backward pass would copy a slice of the concatenation's gradient again and again."""
    x, skip = (torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    seen: list[torch.Tensor] = []
    y = x * 1
    y.register_hook(seen.append)
    joined = concatenate(y, skip)
    weight = torch.randn(2, 12, 4, 4).to(memory_format=torch.channels_last)
    (joined * weight).sum().backward()
    assert torch.equal(joined, torch.cat([x, skip], 1))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None and torch.equal(x.grad, weight[:, :6])
    assert skip.grad is not None and torch.equal(skip.grad, weight[:, 6:])
