"""What one training run computes: from samples to batches (in the loader's workers), and from a batch to losses (on the device)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from t2i_experts.conditioning.conditioner import PromptTokenizer, TextConditioner
from t2i_experts.config import EncoderConfig, StageConfig
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.shards.order import position_rng
from t2i_experts.shards.reader import Sample
from t2i_experts.types import Denoiser, Tokens


@dataclass(frozen=True)
class Batch:
    """Samples side by side, on the CPU.

    positions: places in the global order. images: (B, 3, H, W) uint8. drops: encoder name -> (B,) bool, True = this row goes without it.
    """

    positions: tuple[int, ...]
    keys: tuple[str, ...]
    images: Tensor
    tokens: Mapping[str, Tokens]
    drops: Mapping[str, Tensor]

    def pin_memory(self) -> Batch:
        """The images in page-locked memory, so that they travel to the GPU in the background (called by torch's DataLoader)."""
        return replace(self, images=self.images.pin_memory())


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples. Which encoders a row goes without depends on (seed, its position) alone."""

    tokenizer: PromptTokenizer
    drop_rates: Mapping[str, float]
    seed: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        draws = np.stack([position_rng(self.seed, sample.position, "drop").random(len(self.drop_rates)) for sample in samples])
        return Batch(
            positions=tuple(sample.position for sample in samples),
            keys=tuple(sample.key for sample in samples),
            images=torch.stack([sample.image for sample in samples]),
            tokens=self.tokenizer([sample.caption for sample in samples]),
            drops={name: torch.from_numpy(draws[:, i] < rate) for i, (name, rate) in enumerate(self.drop_rates.items())},
        )


class DiffusionTask:
    """EDM's objective for a stage: noise drawn from p(sigma), all encoders dropped independently (eDiff-I section 4.2)."""

    def __init__(self, stage: StageConfig, conditioner: TextConditioner, *, seed: int, device: torch.device, bf16: bool = False) -> None:
        """bf16: the denoiser (not the encoders, which have their own dtype) computes under bfloat16 autocast."""
        self.stage = stage
        self.conditioner = conditioner
        self.seed = seed
        self.device = device
        self.bf16 = bf16
        self.noise = LogNormalSigma(stage.noise.mean, stage.noise.std)
        self.loss = EDMLoss(stage.noise.sigma_data)

    def collate(self, encoders: Mapping[str, EncoderConfig] | None = None) -> Collate:
        """How the loader makes batches, with the drop rates of `encoders` (by default the stage's own)."""
        encoders = self.stage.encoders if encoders is None else encoders
        return Collate(self.conditioner.tokenizer, {name: encoder.drop for name, encoder in encoders.items()}, self.seed)

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] on the device, channels last."""
        images = batch.images.to(self.device, non_blocking=True).float() / 127.5 - 1
        return images.contiguous(memory_format=torch.channels_last)

    def losses(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """The loss of each image, (B,) float32.

        Seeds torch's generators from (seed, first position), so that the noise of a batch is the same whenever the run comes to it.
        """
        seed = int(position_rng(self.seed, batch.positions[0], "noise").integers(2**63))
        torch.manual_seed(seed)  # for dropout
        generator = torch.Generator(self.device).manual_seed(seed)
        images = self.images(batch)
        conditioning = self.conditioner.encode(batch.tokens, images, batch.drops)
        sigma = self.noise.sample((len(batch.positions),), generator=generator)
        eps = torch.randn(images.shape, generator=generator, device=self.device)
        with self.autocast():
            return self.loss(denoiser, images, sigma, eps, conditioning)

    def autocast(self) -> torch.autocast:
        """The precision that the denoiser computes in; its weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
