"""The denoiser's U-Net: ADM's shape (Dhariwal & Nichol 2021) with eDiff-I's conditioning (Balaji et al. 2022, section 4).

Every resolution has residual blocks, each followed by self-attention and cross-attention where its spec says so. Going down, the first
block of a lower resolution halves the sides; going up, a block of the finer resolution's width doubles them. Every output on the way
down is concatenated to the input of one block on the way up. Nothing here knows of noise distributions, prompts or files.

The first convolution takes its input whole where the rest computes in bfloat16: at sigma = 0.002 the noise has 0.4 % of the input's scale,
and rounding the input would add 18 % to its variance. So it sees every channel twice, as rounded and as what rounding left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from t2i_experts.config import ResolutionSpec
from t2i_experts.nn.attention import CrossAttention, SelfAttention, fastest_kernels
from t2i_experts.nn.embeddings import ContextEmbedding, NoiseEmbedding
from t2i_experts.nn.layers import Convolution, Resample, ResidualBlock, concatenate, rms_norm, zeroed
from t2i_experts.types import Embedding


class UNetBlock(nn.Module):
    """One residual block and the attention behind it.

    projection: a convolution of its output, none unless somebody adds one.
    checkpointed: of what it computes, only its inputs are remembered for the backward pass, which computes the rest again.
    """

    def __init__(
        self,
        block: ResidualBlock,
        self_attention: SelfAttention | None,
        cross_attention: CrossAttention | None,
        *,
        checkpointed: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.residual = block
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.projection: Convolution | None = None

    def forward(self, x: Tensor, scale_shift: Tensor, key_value: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """x: (B, H, W, C). scale_shift: see `ResidualBlock`. key_value: see `CrossAttention`. skip: (B, H, W, C'), concatenated to x, which
        together have the residual block's input channels."""
        inputs = (x, scale_shift, key_value, skip)
        if self.checkpointed and torch.is_grad_enabled():
            random = self.training and self.residual.dropout > 0
            return checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=random)
        return self._compute(*inputs)

    def _compute(self, x: Tensor, scale_shift: Tensor, key_value: Tensor | None, skip: Tensor | None) -> Tensor:
        x = self.residual(x if skip is None else concatenate(x, skip), scale_shift)
        if self.self_attention is not None:
            x = self.self_attention(x)
        if self.cross_attention is not None:
            assert key_value is not None
            x = self.cross_attention(x, key_value)
        return x if self.projection is None else self.projection(x)


class UNet(nn.Module):
    """F(x; c_noise, context) of EDM: an image-sized output for an image-sized input.

    resolutions: from the finest downwards. encoders: encoder name -> (token width, pooled width or 0). in_channels, out_channels: of the
    images. patch_size: p > 1 folds each p x p pixels into the channels of one (space to depth), and the output back, so that the first
    resolution, the dearest, has 1/p of the image's side. checkpointed_resolutions: so many, from the finest downwards, have checkpointed
    blocks (see `UNetBlock`).
    """

    def __init__(
        self,
        resolutions: Sequence[ResolutionSpec],
        encoders: Mapping[str, tuple[int, int]],
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int = 1,
        embedding_channels: int,
        context_channels: int,
        head_channels: int = 64,
        dropout: float = 0.0,
        checkpointed_resolutions: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.noise_embedding = NoiseEmbedding(embedding_channels)
        self.context_embedding = ContextEmbedding(encoders, context_channels=context_channels, embedding_channels=embedding_channels)

        def block(level: int, in_channels: int, mode: Resample = "keep", *, attend: bool = True) -> UNetBlock:
            spec = resolutions[level]
            channels = spec.channels
            return UNetBlock(
                ResidualBlock(in_channels, channels, mode=mode, dropout=dropout),
                SelfAttention(channels, head_channels) if attend and spec.self_attention else None,
                CrossAttention(channels, context_channels, head_channels) if attend and spec.cross_attention else None,
                checkpointed=level < checkpointed_resolutions,
            )

        channels = resolutions[0].channels
        self.conv_in = Convolution(in_channels * patch_size**2, channels, 3, bias=True)
        skips = [channels]
        self.down = nn.ModuleList()
        for level, spec in enumerate(resolutions):
            if level:
                self.down.append(block(level, channels, "down", attend=False))
                channels = spec.channels
                skips.append(channels)
            for _ in range(spec.blocks):
                self.down.append(block(level, channels))
                channels = spec.channels
                skips.append(channels)
        lowest = len(resolutions) - 1
        self.middle = nn.ModuleList([block(lowest, channels), block(lowest, channels, attend=False)])
        self.up = nn.ModuleList()
        self.skips_of_up: list[bool] = []  # whether each block on the way up takes a skip
        for level, spec in reversed(list(enumerate(resolutions))):
            if level < len(resolutions) - 1:
                self.up.append(block(level, channels, "up", attend=False))
                self.skips_of_up.append(False)
                channels = spec.channels
            for _ in range(spec.blocks + 1):
                self.up.append(block(level, channels + skips.pop()))
                self.skips_of_up.append(True)
                channels = spec.channels
        assert not skips
        self.conv_out = zeroed(Convolution(channels, out_channels * patch_size**2, 3, bias=True))
        self.scale_shift = zeroed(nn.Linear(embedding_channels, sum(self._scales_and_shifts())))  # of all blocks at once

    def _blocks(self) -> list[UNetBlock]:
        return [block for part in (self.down, self.middle, self.up) for block in part if isinstance(block, UNetBlock)]

    def _scales_and_shifts(self) -> list[int]:
        """How many scales and shifts each block takes."""
        return [2 * block.residual.out_channels for block in self._blocks()]

    def kernels(self, device: torch.device) -> AbstractContextManager[None]:
        """See `Network`."""
        return fastest_kernels(device)

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        """All that depends on the prompt and not on sigma: what `forward` takes as `projected`, batch first."""
        context, mask, vector = self.context_embedding(embeddings)
        projected = {"vector": vector}
        for i, block in enumerate(self._blocks()):
            if block.cross_attention is not None:
                projected[f"key_value.{i}"] = block.cross_attention.project(context, mask)
        return projected

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        """x: (B, C_in, H, W) float32, scaled to unit variance; c_noise: (B,) float32, ln(sigma)/4; projected: from `project`.

        Returns (B, C_out, H, W) in the dtype of the computation, autocast's or the weights'. H and W must be divisible by
        patch_size * 2^(resolutions - 1).
        """
        noise = self.noise_embedding(c_noise)
        scale_shift = iter(self.scale_shift(F.silu(noise + projected["vector"])).split(self._scales_and_shifts(), dim=1))
        key_values = iter(projected.get(f"key_value.{i}") for i in range(len(self._blocks())))
        x = self._first_convolution(x.float(), noise.dtype)  # the dtype that a linear layer computes in here
        skips = [x]
        for block in self.down:
            x = block(x, next(scale_shift), next(key_values))
            skips.append(x)
        for block in self.middle:
            x = block(x, next(scale_shift), next(key_values))
        for block, takes_skip in zip(self.up, self.skips_of_up, strict=True):
            x = block(x, next(scale_shift), next(key_values), skips.pop() if takes_skip else None)
        x = self.conv_out(F.silu(rms_norm(x))).permute(0, 3, 1, 2)
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x

    def _first_convolution(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, C_in, H, W) float32 -> (B, H/p, W/p, C) in `dtype`, that of the computation, in which x alone is not rounded."""
        x = F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        weight, bias = self.conv_in.weight, self.conv_in.bias
        assert bias is not None
        if dtype != torch.float32:
            rounded = x.to(dtype)
            x = torch.cat([rounded, (x - rounded).to(dtype)], dim=1)
            weight = torch.cat([weight, weight], dim=1)
        return F.conv2d(x, weight.to(dtype), bias.to(dtype), padding=1).permute(0, 2, 3, 1)
