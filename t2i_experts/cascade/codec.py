"""What the denoiser works on: pictures, or the latents that a codec makes of them (Rombach et al., arXiv 2112.10752).

eDiff-I denoises pixels. With a codec between the pictures and everything else, the same trainer, samplers and experts work on latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from t2i_experts.config import StageConfig
from t2i_experts.registry import registry


class Codec(Protocol):
    """Between pictures and what is denoised. Registered under `codec` by its kind.

    It is frozen: `encode` and `decode` compute without gradients, and in its own dtype whatever autocast is around them.

    channels, factor: pictures (B, 3, H, W) become (B, channels, H / factor, W / factor); both multiples of `factor`.
    model: its weights, on the device on which `encode` and `decode` run; None if it has none.
    files: those of a local folder that `load` reads, and which a model folder copies to `vae/`, which its `stage.codec.model` then names:
    `local_folder(stage.codec.model, root, "codec")` finds either. () for public weights and for none.

    A class may have two class methods more, for `t2i-experts doctor`: `find(config: CodecConfig)`, which says as a `Presence` where its
    files are, and `blank(stage)`, which gives a codec whose `model` is on the meta device, or None, for the estimate of memory.
    """

    channels: int
    factor: int
    model: nn.Module | None
    files: tuple[Path, ...]

    @classmethod
    def load(cls, stage: StageConfig, root: Path | None, device: torch.device | str) -> Codec:
        """The codec that `stage.codec` names. root: the model folder that is being read, in which it may lie."""
        ...

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is denoised for pictures (B, 3, H, W) float32 in [-1, 1]: (B, C, H / factor, W / factor) float32.

        Its standard deviation is `stage.noise.sigma_data`. A codec that is random draws from the generator, which is on the same device, as
        in training; without one it gives its best guess, and the same one every time.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures, (B, 3, H, W) float32 nominally in [-1, 1], of what `encode` gave or a sampler made, (B, C, H / factor, W / factor)."""
        ...


class PixelCodec:
    """No codec: pictures are denoised as they are, which is eDiff-I. Nothing is computed or copied."""

    channels = 3
    factor = 1
    model: nn.Module | None = None
    files: tuple[Path, ...] = ()

    @classmethod
    def load(cls, stage: StageConfig, root: Path | None, device: torch.device | str) -> PixelCodec:
        """There is nothing to read."""
        return cls()

    @classmethod
    def blank(cls, stage: StageConfig) -> PixelCodec:
        """Itself."""
        return cls()

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The pictures."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures."""
        return latents


PIXEL = PixelCodec()


def load_codec(stage: StageConfig, *, root: Path | None = None, device: torch.device | str = "cpu") -> Codec:
    """The codec of a stage on `device`. A relative folder is looked for in `root`, a model folder, and then in the working directory.

    Raises ValueError for an unknown kind, files that cannot be loaded, and channels or a factor that are not the configured ones.
    """
    try:
        codec: Codec = registry.get("codec", stage.codec.kind).load(stage, root, device)
        _refuse_misfit(codec, stage)
    except ValueError as error:
        raise ValueError(f"codec: {error}") from error
    return codec


def blank_codec(stage: StageConfig) -> Codec | None:
    """The codec of a stage without its weights, on the meta device; None if what it is made of is not known here.

    Raises ValueError for an unknown kind, and channels or a factor that are not the configured ones.
    """
    try:
        blank = getattr(registry.get("codec", stage.codec.kind), "blank", None)
        codec: Codec | None = blank(stage) if blank else None
        if codec is not None:
            _refuse_misfit(codec, stage)
    except ValueError as error:
        raise ValueError(f"codec: {error}") from error
    return codec


def _refuse_misfit(codec: Codec, stage: StageConfig) -> None:
    for field in ("channels", "factor"):
        found, configured = getattr(codec, field), getattr(stage.codec, field)
        if found != configured:
            raise ValueError(f"{field}={configured}, but {stage.codec.model or stage.codec.kind!r} has {found}")


def latent_shape(stage: StageConfig, shape: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of what is denoised for pictures of (width, height) pixels."""
    width, height = shape
    return (stage.codec.channels, height // stage.codec.factor, width // stage.codec.factor)


def fits(codec: Codec, stage: StageConfig) -> bool:
    """Whether a codec gives what the stage's config says; pixels alone, which another codec may give the shape of, are `PIXEL`'s."""
    same_shape = (codec.channels, codec.factor) == (stage.codec.channels, stage.codec.factor)
    return same_shape and isinstance(codec, PixelCodec) != stage.codec.latents
