"""The norm over channels and the residual block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from t2i_experts.nn.layers import Convolution, Resample, ResidualBlock, concatenate, resample, rms_norm


def test_rms_norm_agrees_with_torch() -> None:
    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (8,), eps=1e-6))


def test_rms_norm_sees_channels_only() -> None:
    """Changing one pixel changes no other: what GroupNorm would break."""
    x = torch.randn(1, 4, 4, 8)
    y = x.clone()
    y[:, 0, 0] *= 100
    assert torch.equal(rms_norm(x)[:, 1:, 1:], rms_norm(y)[:, 1:, 1:])


def test_rms_norm_keeps_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 2, 2, 4)), torch.zeros(1, 2, 2, 4))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_agrees_with_torch(kernel: int) -> None:
    module = Convolution(5, 7, kernel, bias=True).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 5)
    expected = F.conv2d(x.movedim(-1, 1), module.weight, module.bias, padding="same")
    out = module(x)
    torch.testing.assert_close(out.movedim(-1, 1), expected)
    assert out.is_contiguous(), "channels last in memory"


@pytest.mark.parametrize(("mode", "reference"), [("down", F.avg_pool2d), ("up", F.interpolate)])
def test_resample_agrees_with_torch(mode: Resample, reference: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(2, 4, 6, 3)
    expected = reference(x.movedim(-1, 1), 2) if mode == "down" else reference(x.movedim(-1, 1), scale_factor=2)
    torch.testing.assert_close(resample(x, mode).movedim(-1, 1), expected)


@pytest.mark.parametrize(("mode", "side"), [("keep", 8), ("down", 4), ("up", 16)])
def test_fresh_residual_block_is_its_shortcut(mode: Resample, side: int) -> None:
    block = ResidualBlock(6, 6, mode=mode)
    x = torch.randn(2, 8, 8, 6)
    out = block(x, torch.randn(2, 12))
    assert out.shape == (2, side, side, 6)
    torch.testing.assert_close(out, resample(x, mode))


def test_scales_and_shifts_belong_to_channels() -> None:
    """A scale of -1 and no shift silences the second convolution's input; a shift alone, then, is all that it sees."""
    block = ResidualBlock(4, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(1, 4, 4, 4)
    silent = torch.cat([-torch.ones(1, 8), torch.zeros(1, 8)], dim=1)
    torch.testing.assert_close(block(x, silent), block.shortcut(x))
    shift = torch.randn(8)
    seen = F.silu(shift).expand(1, 4, 4, 8)
    torch.testing.assert_close(block(x, silent + torch.cat([torch.zeros(8), shift])), block.shortcut(x) + block.conv_out(seen))


def test_concatenation_keeps_the_magnitude() -> None:
    x, skip = torch.randn(2, 4, 4, 600), torch.randn(2, 4, 4, 600)
    assert concatenate(x, skip).shape == (2, 4, 4, 1200)
    torch.testing.assert_close(concatenate(x, skip).norm(dim=-1), x.norm(dim=-1), rtol=0.1, atol=0)


def test_a_concatenations_gradients_are_dense() -> None:
    """A convolution's backward pass would copy a slice of the concatenation's gradient again and again."""
    x, skip = (torch.randn(2, 4, 4, 6, requires_grad=True) for _ in range(2))
    seen: list[torch.Tensor] = []
    y = x * 1
    y.register_hook(seen.append)
    weight = torch.randn(2, 4, 4, 12)
    (concatenate(y, skip) * weight).sum().backward()
    assert seen[0].is_contiguous()
    assert x.grad is not None and skip.grad is not None
    torch.testing.assert_close(torch.cat([x.grad, skip.grad], -1), weight * 2**-0.5)
