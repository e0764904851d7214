"""This project's U-Net at the sizes that are measured, with weights and inputs that stand for those of a run; no encoder takes part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from t2i_experts.cascade.stage import IMAGE_CHANNELS, build_network
from t2i_experts.config import EncoderConfig, NetworkConfig, ResolutionSpec, StageConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.types import Conditioning, Embedding


@dataclass(frozen=True)
class Size:
    """What a network here and its counterpart in `baseline` have in common, from the finest resolution downwards.

    image: side in pixels. channels: of each resolution; all but the first have self- and cross-attention. blocks: this project's, of each
    resolution. layers: diffusers', chosen so that an evaluation of either has the same FLOPs within 5 %: each of diffusers' attentions has
    a feed-forward network behind it. head_channels: of an attention head. text_channels: of a text token that cross-attention sees.
    """

    image: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    layers: tuple[int, ...]
    head_channels: int
    text_channels: int
    norm_groups: int


SIZES: Mapping[str, Size] = {
    "100m": Size(64, (128, 256, 384, 512), (2, 2, 2, 2), (2, 1, 2, 2), head_channels=64, text_channels=512, norm_groups=32),
    "tiny": Size(16, (16, 32), (1, 1), (1, 1), head_channels=16, text_channels=32, norm_groups=8),
}
ENCODERS: Mapping[str, EncoderConfig] = {  # those of the embedded model, which are never loaded
    "t5": EncoderConfig("t5", "-", width=192, max_tokens=48),
    "clip_text": EncoderConfig("clip_text", "-", width=128, pooled_width=192, max_tokens=48),
    "clip_image": EncoderConfig("clip_image", "-", width=192, pooled_width=192, max_tokens=1),
}
TEXT_TOKENS = sum(encoder.max_tokens for encoder in ENCODERS.values())


def size_named(name: str) -> Size:
    """Raises ValueError for a name that is none of `SIZES`."""
    if name not in SIZES:
        raise ValueError(f"--network={name!r} must be one of {', '.join(SIZES)}")
    return SIZES[name]


def stage_of(size: Size) -> StageConfig:
    """The stage whose network is measured."""
    levels = list(zip(size.channels, size.blocks, strict=True))
    resolutions = [ResolutionSpec(channels, blocks, level > 0, level > 0) for level, (channels, blocks) in enumerate(levels)]
    network = NetworkConfig(
        resolutions, embedding_channels=size.text_channels, context_channels=size.text_channels, head_channels=size.head_channels
    )
    return StageConfig(size=size.image, network=network, encoders=dict(ENCODERS))


def own_network(size: Size, device: torch.device) -> EDMPrecond:
    """Float32, the same weights at every call; those that begin at zero are drawn, too, so that every branch of the network counts."""
    torch.manual_seed(0)
    with device:
        network = build_network(stage_of(size))
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.01)
    return network


def noise_images(size: Size, batch: int, device: torch.device, seed: int) -> torch.Tensor:
    """(B, 3, H, W) unit Gaussian, float32 in channels-last memory."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, IMAGE_CHANNELS, size.image, size.image, generator=generator)
    return images.to(device).contiguous(memory_format=torch.channels_last)


def captions(batch: int, device: torch.device, encoders: Mapping[str, EncoderConfig] = ENCODERS) -> Conditioning:
    """What encoders might say of captions that fill half of their tokens."""
    generator = torch.Generator().manual_seed(0)

    def embedding(encoder: EncoderConfig) -> Embedding:
        mask = torch.arange(encoder.max_tokens).expand(batch, -1) < max(1, encoder.max_tokens // 2)
        pooled = torch.randn(batch, encoder.pooled_width, generator=generator) if encoder.pooled_width else None
        return Embedding(torch.randn(batch, encoder.max_tokens, encoder.width, generator=generator), mask, pooled)

    return Conditioning({name: embedding(encoder) for name, encoder in encoders.items()}).map(lambda tensor: tensor.to(device))
