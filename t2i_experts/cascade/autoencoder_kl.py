"""The codec `autoencoder_kl`: a variational autoencoder of diffusers, such as those of Stable Diffusion, SDXL and FLUX.

Latents z become (z - shift_factor) * scaling_factor, as the autoencoder's config says, or (z - latents_mean) / latents_std where it has
these: either has a standard deviation of about 1. Times sigma_data, they have the one that preconditioning and loss suppose, whatever
sigma_data is (EDM2, Karras et al. 2312.02696, does so with 0.5).

It computes in float32 or bfloat16, and never in float16, in which SDXL's overflows: that alone is what diffusers' `force_upcast` is about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from t2i_experts.conditioning.frozen import device_of, dtype_named, freeze, frozen_forward, local_folder
from t2i_experts.conditioning.presence import Presence, cached
from t2i_experts.config import CodecConfig, StageConfig

FILES = ("config.json", "diffusion_pytorch_model.safetensors")
PIXELS = 2**20
"""Of the pictures that are computed together, so that the memory that this takes depends on no batch size."""
_INSTALL = "pip install 't2i-experts[latents]', or pip install diffusers"


class AutoencoderKLCodec:
    """A frozen `diffusers.AutoencoderKL`.

    In training it encodes to a sample of the posterior, as latent diffusion is trained; without a generator to the posterior's mode.
    """

    def __init__(self, model: Any, sigma_data: float, files: tuple[Path, ...] = ()) -> None:
        """model: with its weights, where and in which dtype it is to compute. Raises ValueError for a normalisation that does not fit."""
        config = model.config
        self.model: Any = model
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.files = files
        shift, scale = [config.shift_factor or 0.0], [config.scaling_factor]
        if config.latents_mean and config.latents_std:
            shift, scale = list(config.latents_mean), [1 / deviation for deviation in config.latents_std]
            if not len(shift) == len(scale) == self.channels:
                raise ValueError(
                    f"the autoencoder has {self.channels} channels, but {len(shift)} latents_mean and {len(scale)} latents_std"
                )
        for name, values in (("latents_shift", shift), ("latents_scale", [value * sigma_data for value in scale])):
            factors = torch.tensor(values, dtype=torch.float32, device=device_of(model))[:, None, None]
            model.register_buffer(name, factors)  # so that it is wherever the weights are, and in their fingerprint

    @classmethod
    def load(cls, stage: StageConfig, root: Path | None, device: torch.device | str) -> AutoencoderKLCodec:
        """Reads a local folder, or downloads from the hub once. Raises ValueError for what is missing, damaged or no such autoencoder."""
        model = str(stage.codec.model)
        dtype = dtype_named(stage.codec.dtype, model, "codec")
        folder = local_folder(model, root, "codec")
        place = _downloaded(model) if folder is None else folder
        _read_config(place)
        if not (place / FILES[1]).is_file():
            raise ValueError(f"{place} lacks {FILES[1]}; weights in other formats are not read")
        with _quiet() as library:
            try:
                loaded, report = library.AutoencoderKL.from_pretrained(place, use_safetensors=True, output_loading_info=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise ValueError(f"the autoencoder in {place} cannot be loaded: {' '.join(str(error).split())}") from error
            if report["missing_keys"]:
                missing = sorted(report["missing_keys"])
                raise ValueError(f"the autoencoder in {place} lacks the weights {missing[:3]} ({len(missing)} in all)")
            frozen = freeze(loaded, device, dtype)
        files = () if folder is None else tuple(folder / name for name in FILES)
        return cls(frozen, stage.noise.sigma_data, files)

    @classmethod
    def blank(cls, stage: StageConfig) -> AutoencoderKLCodec | None:
        """The one that `load` would give, on the meta device; None if its config.json is not on this machine, or diffusers."""
        model = str(stage.codec.model)
        try:
            file, _ = _here(model)
            config = _read_config(file.parent) if file else None
        except ValueError:
            return None
        if config is None or find_spec("diffusers") is None:
            return None
        with torch.device("meta"), _quiet() as library:
            blank = freeze(library.AutoencoderKL.from_config(config), "meta", dtype_named(stage.codec.dtype, model, "codec"))
        return cls(blank, stage.noise.sigma_data)

    @classmethod
    def find(cls, config: CodecConfig) -> Presence:
        """Where its files are, or how to get them."""
        model = str(config.model)
        if find_spec("diffusers") is None:
            return Presence(remedy=f"the codec autoencoder_kl needs diffusers: {_INSTALL}")
        try:
            folder = local_folder(model, None, "codec")
            file, weights = _here(model)
            if file is not None:
                _read_config(file.parent)
        except ValueError as error:
            return Presence(remedy=f"{error}; put the autoencoder there, or name a hub id")
        if file is not None and weights is not None:
            return Presence(weights.parent, weights.stat().st_size, local=folder is not None)
        if folder is not None:
            lacking = [name for name in FILES if not (folder / name).is_file()]
            return Presence(remedy=f"{folder} lacks {' and '.join(lacking)}: copy the whole autoencoder there")
        repository, inside = _on_the_hub(model)
        names = " ".join(f"{inside}{name}" for name in FILES)
        return Presence(remedy=f"hf download {repository} {names}, or set stage.codec.model to a local folder that holds them")

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of pictures (B, 3, H, W) in [-1, 1], (B, C, H / factor, W / factor) float32; see `Codec`."""
        rows = max(1, PIXELS // (images.shape[2] * images.shape[3]))
        with frozen_forward(device_of(self.model)):
            parts = images.to(self.model.dtype).contiguous().split(rows)
            posteriors = [self.model.encode(part).latent_dist for part in parts]
            latents = torch.cat([posterior.mean for posterior in posteriors]).float()
            if generator is not None:
                deviation = torch.cat([posterior.std for posterior in posteriors]).float()
                latents = latents + deviation * torch.randn(latents.shape, generator=generator, device=latents.device)
            return (latents - self.model.latents_shift) * self.model.latents_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures of latents, (B, 3, H, W) float32; see `Codec`."""
        rows = max(1, PIXELS // (latents.shape[2] * latents.shape[3] * self.factor**2))
        with frozen_forward(device_of(self.model)):
            latents = latents.float() / self.model.latents_scale + self.model.latents_shift
            parts = latents.to(self.model.dtype).contiguous().split(rows)
            return torch.cat([self.model.decode(part).sample for part in parts]).float()


@contextmanager
def _quiet() -> Iterator[Any]:
    """The module `diffusers`, which meanwhile warns of nothing. Raises ValueError, which tells how to install it, where it is missing."""
    try:
        import diffusers
        from diffusers.utils import logging
    except ImportError as error:
        raise ValueError(f"the codec autoencoder_kl needs diffusers: {_INSTALL}") from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield diffusers
    finally:
        logging.set_verbosity(verbosity)


def _on_the_hub(model: str) -> tuple[str, str]:
    """Repository, and the folder inside it with a slash at its end ("" for none). Raises ValueError for what cannot be a hub id."""
    owner, _, rest = model.partition("/")
    name, _, inside = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"codec model {model!r} is neither a folder nor a hub id of the form owner/name or owner/name/folder")
    return f"{owner}/{name}", f"{inside.rstrip('/')}/" if inside else ""


def _here(model: str) -> list[Path | None]:
    """Where each of `FILES` is: in the local folder, or among what the hub has given before. Raises ValueError for what can be neither."""
    folder = local_folder(model, None, "codec")
    if folder is None:
        repository, inside = _on_the_hub(model)
        return [cached(repository, f"{inside}{name}") for name in FILES]
    return [folder / name if (folder / name).is_file() else None for name in FILES]


def _downloaded(model: str) -> Path:
    """The folder in the hub's cache with all that is read. Raises ValueError if the hub does not give it."""
    repository, inside = _on_the_hub(model)
    try:
        paths = [Path(hf_hub_download(repository, f"{inside}{name}")) for name in FILES]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"codec model {model!r} is not a local folder, and the hub did not give it: {reason}") from error
    return paths[0].parent


def _read_config(folder: Path) -> dict[str, Any]:
    """An autoencoder's config.json. Raises ValueError if it is missing, or another network's."""
    path = folder / FILES[0]
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind != "AutoencoderKL":
        raise ValueError(f"{path} is of {kind or 'no network of diffusers'}; the codec autoencoder_kl reads AutoencoderKL")
    colours = [config.get("in_channels", 3), config.get("out_channels", 3)]
    if colours != [3, 3]:
        raise ValueError(f"{path} has in_channels={colours[0]}, out_channels={colours[1]}; pictures have 3")
    return dict(config)
