"""One stage of the cascade: a denoiser with the codec, the noise and the sampling settings that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from t2i_experts.cascade.codec import PIXEL, Codec, fits, latent_shape
from t2i_experts.config import SamplingConfig, StageConfig, check_threshold
from t2i_experts.diffusion.guidance import ClassifierFreeGuidance
from t2i_experts.diffusion.precond import EDMPrecond, Network
from t2i_experts.diffusion.thresholding import DynamicThresholding
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.projections import add_projections
from t2i_experts.experts.sampling import guidance_scale, schedule
from t2i_experts.nn.unet import UNet
from t2i_experts.registry import registry
from t2i_experts.types import Conditioning, Denoiser

IMAGE_CHANNELS = 3
Progress = Callable[[int, int, Tensor], None]
"""Called after each step with (steps done, steps in all, the denoised images of that step, or latents of a stage that has such)."""


def build_network(config: StageConfig, *, checkpointed_resolutions: int = 0) -> EDMPrecond:
    """The stage's network, preconditioned, with fresh weights on torch's default device, in channels-last memory.

    Its backbone is the registry's: a function of the stage and the numbers of channels that gives a `Network` (an `nn.Module`), as
    `build_unet`. checkpointed_resolutions: the U-Net's alone, so many, from the finest downwards, are computed again in the backward
    pass; see `UNet`. Raises ValueError if there is none of that name, TypeError for a network that could be neither trained nor saved.
    """
    backbone = config.network.backbone
    more = {"checkpointed_resolutions": checkpointed_resolutions} if checkpointed_resolutions else {}
    channels = config.codec.channels
    network: Any = registry.get("backbone", backbone)(config, in_channels=channels, out_channels=channels, **more)
    if not isinstance(network, nn.Module) or not callable(getattr(network, "project", None)):
        raise TypeError(f"the backbone {backbone!r} gave {type(network).__name__}; it must give a torch.nn.Module with a method project")
    unsaved = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    if unsaved:
        raise TypeError(f"the backbone {backbone!r} has buffers that a model folder would lose, {sorted(unsaved)}; make them persistent")
    return EDMPrecond(cast(Network, network), config.noise.sigma_data).to(memory_format=torch.channels_last)


def build_unet(config: StageConfig, *, in_channels: int, out_channels: int, checkpointed_resolutions: int = 0) -> UNet:
    """The backbone `unet`."""
    network = config.network
    unet = UNet(
        network.resolutions,
        {name: (encoder.width, encoder.pooled_width) for name, encoder in config.encoders.items()},
        in_channels=in_channels,
        out_channels=out_channels,
        patch_size=network.patch_size,
        embedding_channels=network.embedding_channels,
        context_channels=network.context_channels,
        head_channels=network.head_channels,
        dropout=network.dropout,
        checkpointed_resolutions=checkpointed_resolutions,
    )
    if network.projections:
        add_projections(unet, "stream")
    return unet


def image_shapes(config: StageConfig) -> list[tuple[int, int]]:
    """(width, height) of the pictures that a stage is trained to make: the square first, then its other buckets."""
    square = (config.size, config.size)
    return [square, *(shape for width, height in config.buckets if (shape := (width, height)) != square)]


def check_shape(config: StageConfig, shape: tuple[int, int], received: str) -> None:
    """Raises ValueError, which begins with what was `received`, for a (width, height) that is none of the stage's."""
    if shape not in image_shapes(config):
        allowed = ", ".join(f"{width}x{height}" for width, height in image_shapes(config))
        raise ValueError(f"{received}; this model makes pictures of {allowed} px and no others")


@dataclass(frozen=True)
class Stage:
    """A denoiser that makes pictures of one size, or of the shapes of its buckets.

    config: what it was trained as. denoiser: its weights. sampling: its default settings. codec: that of the config, loaded.
    leaves: of an ensemble, the interval of each expert by the name that `SamplingConfig.experts` calls it, from low noise to high.
    """

    config: StageConfig
    denoiser: Denoiser
    sampling: SamplingConfig
    codec: Codec = PIXEL
    leaves: Mapping[str, NoiseInterval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert fits(self.codec, self.config), "a stage needs the codec of its config: load_codec(config)"

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the noise that sampling a square picture starts from."""
        return latent_shape(self.config, self.shapes[0])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """See `image_shapes`."""
        return image_shapes(self.config)

    def steps(self, sampling: SamplingConfig) -> int:
        """How many steps a sampling with these settings makes, those of all experts. Raises ValueError as `sample`."""
        return len(schedule(sampling, self.leaves)) - 1

    @torch.no_grad()
    def sample(
        self, noise: Tensor, conditioning: Conditioning, null: Conditioning, sampling: SamplingConfig, progress: Progress | None = None
    ) -> Tensor:
        """Solves the probability-flow ODE from sigma_max to 0.

        noise: (B, C, H, W) unit Gaussian, on the device to compute on, of the shape of `latent_shape`. conditioning: B rows. null: one row,
        for guidance. Returns pictures, (B, 3, H, W) float32, clamped to [-1, 1]. Raises ValueError for settings that are out of range.
        """
        check_threshold(sampling.threshold, self.config.codec)
        sigmas = schedule(sampling, self.leaves)
        sampler = registry.get("sampler", sampling.sampler)
        guided = ClassifierFreeGuidance(self.denoiser, null, guidance_scale(sampling, self.leaves), sampling.guidance_interval)
        prepared = guided.prepare(conditioning)
        denoiser: Denoiser = DynamicThresholding(guided, sampling.threshold) if sampling.threshold else guided

        def callback(step: int, sigma: Tensor, denoised: Tensor) -> None:
            if progress is not None:
                progress(step + 1, len(sigmas) - 1, denoised)

        x = noise.float().contiguous(memory_format=torch.channels_last) * float(sigmas[0])
        return self.codec.decode(sampler(denoiser, x, sigmas, prepared, callback=callback)).clamp(-1, 1)
