"""diffusers' UNet2DConditionModel as a backbone, so that this project's trainer trains it: the baseline of `bench quality`.

Its inside is diffusers', with the settings of a stage's own U-Net: patches, widths, heads, and attention over pixels and over text at the
same resolutions. What lies around it is as rich as this project's: every encoder's tokens and pooled vectors at unit scale, each with a
projection of its own, the pooled ones added to the embedding of the noise level, which scales and shifts in every residual block; padding
is masked; the first convolution runs in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from t2i_experts.bench.baseline import diffusers_library
from t2i_experts.bench.floor import flops
from t2i_experts.cascade.codec import latent_shape
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import NetworkConfig, StageConfig, from_plain, to_plain
from t2i_experts.config.schema import ResolutionSpec
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.training.allocations import materialized
from t2i_experts.types import Conditioning, Embedding

NAME = "diffusers-unet"
SIGMAS = (0.002, 80.0)
"""The noise levels, EDM's, that stand at both ends of the timesteps 0 to 1000 for which its embedding is made."""
TOLERANCE = 0.05
"""By how much of this project's FLOPs an evaluation of the baseline may differ."""


class DiffusersBackbone(nn.Module):
    """A `Network` (see `diffusion.precond`) around UNet2DConditionModel."""

    def __init__(self, network: NetworkConfig, encoders: Mapping[str, tuple[int, int]], *, in_channels: int, out_channels: int) -> None:
        """network: as for the backbone `unet`. encoders: name -> (token width, pooled width or 0)."""
        super().__init__()
        specs, patch = network.resolutions, network.patch_size
        widths = [spec.channels for spec in specs]
        attends = [spec.self_attention or spec.cross_attention for spec in specs]
        self.patch_size = patch
        self.network = diffusers_library().UNet2DConditionModel(
            in_channels=in_channels * patch**2,
            out_channels=out_channels * patch**2,
            layers_per_block=[spec.blocks for spec in specs],
            block_out_channels=widths,
            down_block_types=["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
            mid_block_type="UNetMidBlock2DCrossAttn" if attends[-1] else "UNetMidBlock2D",
            up_block_types=["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
            cross_attention_dim=network.context_channels,
            attention_head_dim=[max(width // network.head_channels, 1) for width in widths],  # its name for the number of heads
            norm_num_groups=_norm_groups(widths),
            dropout=network.dropout,
            class_embed_type="identity",  # a vector that is added to the embedding of the noise level
            resnet_time_scale_shift="scale_shift",
        )
        self.network.conv_in = _InFloat32(self.network.conv_in)
        for spec, block in zip(
            [*specs, specs[-1], *reversed(specs)],
            [*self.network.down_blocks, self.network.mid_block, *self.network.up_blocks],
            strict=True,
        ):
            _keep_attention(block, spec)
        vector = self.network.time_embedding.linear_2.out_features
        self.tokens = nn.ModuleDict({name: nn.Linear(width, network.context_channels) for name, (width, _) in encoders.items()})
        self.pooled = nn.ModuleDict({name: nn.Linear(pooled, vector, bias=False) for name, (_, pooled) in encoders.items() if pooled})

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        """What its `forward` takes as `projected`: the text that it attends to, which of it is no padding, and the pooled vectors' sum."""
        context = torch.cat([layer(_unit_scale(embeddings[name].tokens)) for name, layer in self.tokens.items()], dim=1)
        mask = torch.cat([embeddings[name].mask for name in self.tokens], dim=1)
        vector = context.new_zeros(len(context), self.network.time_embedding.linear_2.out_features)
        for name, layer in self.pooled.items():
            pooled = embeddings[name].pooled
            assert pooled is not None
            vector = vector + layer(_unit_scale(pooled))
        return {"context": context, "mask": mask, "vector": vector}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        """x: (B, C_in, H, W) of unit variance; c_noise: (B,) float32, ln(sigma)/4. Returns (B, C_out, H, W)."""
        low, high = (math.log(sigma) / 4 for sigma in SIGMAS)
        x = F.pixel_unshuffle(x, self.patch_size) if self.patch_size > 1 else x
        (x,) = self.network(
            x,
            1000 * (c_noise - low) / (high - low),
            projected["context"],
            class_labels=projected["vector"],
            encoder_attention_mask=projected["mask"],
            return_dict=False,
        )
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x


class _InFloat32(nn.Module):
    """A convolution that autocast leaves alone: bfloat16's rounding of the input would add to the lowest noise levels."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.convolution(x.float())


class _NoAttention(nn.Module):
    """Adds nothing."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(x)


def _keep_attention(block: Any, spec: ResolutionSpec) -> None:
    """Leaves a block the attention that its resolution has; diffusers' own always has both kinds."""
    for transformer in getattr(block, "attentions", ()):
        for layer in transformer.transformer_blocks:
            if not spec.self_attention:
                layer.attn1, layer.norm1 = _NoAttention(), nn.Identity()
            if not spec.cross_attention:
                layer.attn2 = layer.norm2 = None


def _norm_groups(widths: Sequence[int]) -> int:
    """How many groups GroupNorm has: diffusers' 32, or a lower power of two that divides all widths and leaves each group four channels at
    least, as EDM's networks have it."""
    groups = math.gcd(32, *widths)
    while groups > 1 and min(widths) < 4 * groups:
        groups //= 2
    return groups


def _unit_scale(x: Tensor) -> Tensor:
    """Its last dimension at a root mean square of one; zeros stay zeros."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def build_diffusers(stage: StageConfig, *, in_channels: int, out_channels: int) -> DiffusersBackbone:
    """The backbone `NAME`, whose options are the fields of `NetworkConfig` for the backbone `unet`."""
    network = from_plain(NetworkConfig, stage.network.options)
    encoders = {name: (encoder.width, encoder.pooled_width) for name, encoder in stage.encoders.items()}
    return DiffusersBackbone(network, encoders, in_channels=in_channels, out_channels=out_channels)


def as_diffusers(network: NetworkConfig) -> NetworkConfig:
    """The network of this backbone with the settings of one of the backbone `unet`."""
    return NetworkConfig(
        backbone=NAME, options={key: value for key, value in to_plain(network).items() if key not in ("backbone", "options")}
    )


@dataclass(frozen=True)
class Counterpart:
    """The baseline of a stage. network: its config. flops, own_flops: of an evaluation of one image, its and this project's."""

    network: NetworkConfig
    flops: int
    own_flops: int


def counterpart(stage: StageConfig) -> Counterpart:
    """The baseline that takes the same FLOPs as a stage's own U-Net, within `TOLERANCE` where that can be had.

    As few things as possible differ: first the blocks of a resolution, by one; then the widths, which all shrink or grow by the same
    factor. Raises ValueError where diffusers is missing.
    """
    own = own_flops(stage)
    nearest: Counterpart | None = None
    for specs in _scaled(stage.network):
        blocks, count = _blocks_of_equal_flops(stage, specs, own)
        network = replace(stage.network, resolutions=[replace(spec, blocks=n) for spec, n in zip(specs, blocks, strict=True)])
        found = Counterpart(as_diffusers(network), count, own)
        if nearest is None or abs(count - own) < abs(nearest.flops - own):
            nearest = found
        if abs(count / own - 1) <= TOLERANCE:
            break
    assert nearest is not None
    return nearest


def own_flops(stage: StageConfig) -> int:
    """Floating-point operations of an evaluation of one image by the stage's network, whatever its backbone."""
    return _flops(stage, lambda: build_network(stage))


def _scaled(network: NetworkConfig) -> Iterator[list[ResolutionSpec]]:
    """The resolutions as they are, then with scaled widths, the smallest change first; each is then a multiple of the heads' width."""
    yield network.resolutions
    tried = [network.resolutions]
    for eighths in (7, 9, 6, 10, 5, 11, 4, 12):
        widths = [
            max(round(spec.channels * eighths / 8 / network.head_channels), 1) * network.head_channels for spec in network.resolutions
        ]
        specs = [replace(spec, channels=width) for spec, width in zip(network.resolutions, widths, strict=True)]
        if specs not in tried:
            tried.append(specs)
            yield specs


def _blocks_of_equal_flops(stage: StageConfig, specs: Sequence[ResolutionSpec], aim: int) -> tuple[tuple[int, ...], int]:
    """How many blocks of each resolution, at most one more or fewer than it has, and their FLOPs: the fewest changes within `TOLERANCE` of
    the aim, or else the nearest. Every further block of a resolution costs the same."""

    channels, *_ = _shape(stage)

    def count(blocks: Sequence[int]) -> int:
        network = replace(stage.network, resolutions=[replace(spec, blocks=n) for spec, n in zip(specs, blocks, strict=True)])
        changed = replace(stage, network=as_diffusers(network))
        return _flops(stage, lambda: EDMPrecond(build_diffusers(changed, in_channels=channels, out_channels=channels)))

    levels = range(len(specs))
    one = count([1] * len(specs))
    further = [count([1 + (level == other) for other in levels]) - one for level in levels]
    found = {
        blocks: one + sum(cost * (n - 1) for cost, n in zip(further, blocks, strict=True))
        for blocks in itertools.product(*(range(max(spec.blocks - 1, 1), spec.blocks + 2) for spec in specs))
    }

    def preference(blocks: tuple[int, ...]) -> tuple[bool, int, int]:
        off = abs(found[blocks] - aim)
        far = off > TOLERANCE * aim
        return far, 0 if far else sum(abs(n - spec.blocks) for n, spec in zip(blocks, specs, strict=True)), off

    best = min(found, key=preference)
    return best, found[best]


def _flops(stage: StageConfig, make: Callable[[], nn.Module]) -> int:
    """Floating-point operations of an evaluation of one image by a network of a stage, without memory for its weights."""
    with torch.device("meta"):
        network = make()
    with FakeTensorMode():
        materialized(network)
        text = {name: Embedding.null(1, e.max_tokens, e.width, e.pooled_width) for name, e in stage.encoders.items()}
        image = torch.zeros(1, *_shape(stage))
        return flops(lambda: network(image, torch.ones(1), Conditioning(text)))


def _shape(stage: StageConfig) -> tuple[int, int, int]:
    """(C, H, W) of what a stage's network takes and gives."""
    return latent_shape(stage, (stage.size, stage.size))
