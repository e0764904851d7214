"""From a prompt to pictures: the Python door, `CascadePipeline.from_pretrained(folder)(prompt, seed=...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from t2i_experts.cascade.codec import latent_shape
from t2i_experts.cascade.device import default_device, default_dtype, open_device
from t2i_experts.cascade.graphs import GraphedDenoiser, GraphMemory
from t2i_experts.cascade.model_folder import LoadedModel, load_model
from t2i_experts.cascade.one_network import SharingExpert
from t2i_experts.cascade.picture import to_uint8
from t2i_experts.cascade.residency import Budget, take_turns
from t2i_experts.cascade.stage import Progress, Stage, check_shape
from t2i_experts.config import ExpertSamplingConfig, SamplingConfig
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import each_network
from t2i_experts.experts.sampling import check_leaves
from t2i_experts.shards.order import position_rng
from t2i_experts.types import Conditioning, Denoiser


def start_noise(seed: int, index: int, shape: tuple[int, int, int]) -> Tensor:
    """The unit Gaussian noise that image `index` of `seed` starts from, `shape` float32.

    Drawn on the CPU from (seed, index) alone, so that an image does not depend on its batch, the device or the number of GPUs.
    (numpy's generator, since torch's on the CPU reads only 32 bits of its seed.) Raises ValueError for a negative seed or index.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    return torch.from_numpy(position_rng(seed, index, "start noise").standard_normal(shape, dtype=np.float32))


class CascadePipeline:
    """A loaded model folder that makes pictures."""

    def __init__(self, model: LoadedModel, device: torch.device, dtype: torch.dtype) -> None:
        """device, dtype: what the model's networks are on and in."""
        self.model = model
        self.device = device
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        memory: int | None = None,
        one_network: bool = False,
    ) -> CascadePipeline:
        """Loads a model folder or hub id; None is the model embedded in this package, which needs no network.

        device: None takes the best there is. dtype: of the networks; None is `default_dtype`. compile: with
        torch.compile, at the first evaluation of each batch size and shape, which takes a minute. Compiled or not, on CUDA an evaluation
        is recorded at its first time and then replayed (`GraphedDenoiser`). memory: bytes of the device that weights may take, a codec's
        aside; None: on CUDA most of what is free, elsewhere as many as there are. Where encoders and networks need more, they take turns on
        the device, and no evaluation is recorded (see `residency`). one_network: the low-rank experts of an ensemble share one network on
        the device, and its weights are written anew when the expert changes (see `one_network`); the same pictures, bit for bit.
        Raises ValueError for a model that cannot be found or is not whole, for a device that this machine lacks, for one_network without
        low-rank experts, and with it for encoders and networks that need more memory nevertheless.
        """
        device = default_device() if device is None else open_device(device, f"device={str(device)!r}")
        dtype = dtype or default_dtype(device)
        budget, shared = Budget(device, memory), GraphMemory()
        loaded = load_model(model, device=device, dtype=dtype, networks_on=budget.networks_on, one_network=one_network)
        if one_network and budget.exceeded is not None:
            raise ValueError(
                f"memory={memory}: encoders and networks need more than {budget.exceeded:,} bytes, and one_network=True cannot take turns "
                "with the encoders; leave it out, or allow more"
            )

        at_once: dict[int, Denoiser] = {}  # quick networks that several experts share, by what they are made of

        def quick(network: Denoiser) -> Denoiser:
            if isinstance(network, SharingExpert):
                own = network.shared.network
                if id(own) not in at_once:
                    at_once[id(own)] = quick(own)
                return network.evaluating(at_once[id(own)])
            if compile:
                compile_denoiser(cast(EDMPrecond, network), training=False)  # once for all experts of one shape
            return GraphedDenoiser(network, shared) if device.type == "cuda" and budget.exceeded is None else network

        stages = {name: replace(stage, denoiser=each_network(stage.denoiser, quick)) for name, stage in loaded.stages.items()}
        loaded = replace(loaded, stages=stages)
        if budget.exceeded is not None:
            loaded = take_turns(loaded, device, budget.exceeded)
        return cls(loaded, device, dtype)

    @property
    def base(self) -> Stage:
        """The first stage, which makes pictures from noise."""
        return next(iter(self.model.stages.values()))

    def settings(
        self,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        threshold: float | None = None,
        experts: Mapping[str, ExpertSamplingConfig] | None = None,
    ) -> SamplingConfig:
        """The model's own sampling settings with the given ones in their place; None leaves one as it is.

        steps, guidance: for all experts, also where the model has others of its own for some. experts: what some are to have, by the names
        in `base.leaves`. Raises ValueError for a name that is not there.
        """
        own = self.base.sampling.for_all(steps=steps, guidance=guidance)
        merged = {name: own.experts.get(name, ExpertSamplingConfig()) for name in [*own.experts, *(experts or {})]}
        for name, given in (experts or {}).items():
            said = {key: value for key, value in asdict(given).items() if value is not None}
            merged[name] = replace(merged[name], **said)
        settings = replace(
            own,
            sampler=own.sampler if sampler is None else sampler,
            threshold=own.threshold if threshold is None else threshold,
            experts=merged,
        )
        check_leaves(settings, self.base.leaves)
        return settings

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
        style: Tensor | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        shape: tuple[int, int] | None = None,
        sampling: SamplingConfig | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """One picture for each prompt, (B, 3, height, width) uint8 on the CPU.

        prompt: one or several; an empty one gives a picture of the model's own choice. negative: what to steer away from.
        style: (1, 3, H, W) float in [-1, 1], a reference picture for the CLIP image encoder. seed, indices: picture i starts from the
        noise of (seed, indices[i]), by default 0, 1, 2... shape: (width, height), one of `base.shapes`, by default the
        square. sampling: see `settings`. Raises ValueError for numbers that do not fit each other and settings that are out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        indices = range(len(prompts)) if indices is None else indices
        if len(indices) != len(prompts) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(indices)} indices; there must be one of each for every picture")
        stage = self.base
        width, height = shape or stage.shapes[0]
        check_shape(stage.config, (width, height), f"shape={width}x{height}")
        starts = latent_shape(stage.config, (width, height))
        noise = torch.stack([start_noise(seed, index, starts) for index in indices]).to(self.device)
        images = None if style is None else style.to(self.device).expand(len(prompts), -1, -1, -1)
        conditioning = self.model.conditioner(prompts, images)
        images = stage.sample(noise, conditioning, self._null(negative), sampling or stage.sampling, progress)
        return to_uint8(images)

    def _null(self, negative: str) -> Conditioning:
        """One row for the null branch: nothing, or the negative prompt in the text encoders."""
        return self.model.conditioner([negative]) if negative.strip() else self.model.conditioner.null()
